"""A run of seconds; `cf5e105.tar.xz` is a workdir of it, see `stored_test`."""

from ml_collections import ConfigDict

from ma_rlhf_jax.config import apply_arguments, base

_FIELDS = {
    'model.vocab_size': 512,
    'model.num_layers': 1,
    'model.embed_dim': 16,
    'model.mlp_dim': 24,
    'model.num_heads': 2,
    'model.head_dim': 8,
    'model.remat': 'none',
    'model.unroll': 1,
    'model.logprob_chunk': 64,
    'ppo.one_pass': 'joint',
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
    'reward_model.steps': 3,
    'ppo.steps': 12,
    'ppo.eval_every': 6,
    'checkpoint.every': 4,
    'log.sinks': ('jsonl',),
    'log.samples': 2,
}


def get_config(arguments: str = '') -> ConfigDict:
  """The recipe; `arguments` follow the colon of --config."""
  config = base()
  config.update_from_flattened_dict(_FIELDS)
  return apply_arguments(config, arguments)
