"""Recipes; installed as `ma_rlhf_jax.configs`."""
