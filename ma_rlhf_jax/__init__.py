"""MA-RLHF in JAX: PPO whose actions are runs of tokens, for Gemma."""

__version__ = '0.1.0'
