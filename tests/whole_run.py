"""The recipe of a whole run that takes seconds, shared by tests that train."""

from typing import Any

# A model of 10,000 parameters on 300 synthetic rows, all stages.
FIELDS: dict[str, Any] = {
    'model.vocab_size': 512,
    'model.num_layers': 1,
    'model.embed_dim': 16,
    'model.mlp_dim': 24,
    'model.num_heads': 2,
    'model.head_dim': 8,
    'model.remat': 'none',
    'tokenizer.vocab_size': 512,
    'data.synthetic_rows': 300,
    'data.eval_rows': 16,
    'data.max_prompt_len': 64,
    'data.max_response_len': 48,
    'sft.batch_size': 8,
    'reward_model.batch_size': 8,
    'ppo.batch_size': 8,
    'evaluate.prompts': 16,
    'sft.steps': 3,
    'sft.eval_every': 2,
    'reward_model.steps': 3,
    'ppo.steps': 8,
    'ppo.eval_every': 4,
    'checkpoint.every': 4,
    'log.sinks': ('jsonl',),
    'log.samples': 2,
}


def recipe(fields: dict[str, Any] | None = None) -> str:
  """The text of a recipe file: `FIELDS`, and `fields` in place of theirs."""
  return f"""
from ma_rlhf_jax.config import apply_arguments, base

def get_config(arguments=''):
  config = base()
  config.update_from_flattened_dict({FIELDS | (fields or {})!r})
  return apply_arguments(config, arguments)
"""
