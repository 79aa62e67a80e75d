"""Settings of speed and memory that follow from sizes where they say auto.

`model.remat`, `model.unroll`, `model.logprob_chunk` and `ppo.one_pass` change
how fast a run is and what memory it takes, not what it computes. On a CPU the
best values depend on the sizes of the model and its batches; on TPUs and GPUs
auto is one fixed value of each, since memory decides there, and the planner
(`tools.plan --search`) finds better ones for a machine.
"""

from typing import Any

from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.models.presets import GemmaConfig

# Field -> the value that stands for auto, and what it is on TPUs and GPUs.
FIELDS = {
    'model.remat': ('auto', 'full'),
    'model.unroll': (-1, 1),
    'model.logprob_chunk': (0, 512),
    'ppo.one_pass': ('auto', 'joint'),
}

# Bytes of activations that the backward pass may keep of one model on a CPU.
_KEPT = 2 * 2**30
# More layers than this compile for too long without a loop over them.
_MAX_UNROLLED = 8
# Logits of one block on a CPU: about a megabyte stays in its caches, and fewer
# tokens than this make matrix products too thin.
_LOGITS, _MIN_TOKENS = 2**18, 32


def fixed(config: ConfigDict) -> ConfigDict:
  """A copy of `config` with the values for TPUs and GPUs in place of auto."""
  return _chosen(config, {name: value for name, (_, value) in FIELDS.items()})


def _chosen(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
  flat = config_lib.flatten(config)
  flat |= {n: v for n, v in values.items() if flat[n] == FIELDS[n][0]}
  return config_lib.restore(flat)


def resolve(
    config: ConfigDict,
    shape: GemmaConfig | None,
    *,
    prompt_len: int,
    response_len: int,
    platform: str,
) -> ConfigDict:
  """A copy of `config` in which no field of `FIELDS` says auto.

  Args:
    config: of the run.
    shape: of its policy; None where it is unknown, since nothing is trained.
    prompt_len: P, tokens.
    response_len: T, tokens.
    platform: 'cpu', 'tpu' or 'gpu'.
  """
  if platform != 'cpu' or shape is None:
    return fixed(config)
  kept = _kept_bytes(config, shape, prompt_len + response_len)
  remat = config.model.remat
  if remat == 'auto':
    remat = 'none' if kept <= _KEPT else 'full'
  # Without the loop, XLA for CPUs undoes what remat asks for.
  looped = remat != 'none' or shape.num_layers > _MAX_UNROLLED
  large = _is_tree_large(config, shape, kept)
  return _chosen(
      config,
      {
          'model.remat': remat,
          'model.unroll': int(looped),
          'model.logprob_chunk': max(_MIN_TOKENS, _LOGITS // shape.vocab_size),
          'ppo.one_pass': 'policy' if large else 'joint',
      },
  )


def _rows(config: ConfigDict) -> int:
  """Sequences in the largest pass of the stages, forward and backward."""
  ppo = config.ppo
  micro = lambda c, rows: c.micro_batch_size or rows
  passes = {
      'sft': micro(config.sft, config.sft.batch_size),
      'reward_model': 2
      * micro(config.reward_model, config.reward_model.batch_size),
      'ppo': micro(ppo, ppo.batch_size * ppo.samples_per_prompt),
  }
  return max(passes.get(stage, 0) for stage in config.stages)


def _kept_bytes(config: ConfigDict, shape: GemmaConfig, length: int) -> int:
  """Bytes that the backward pass of one model keeps without remat.

  Of each token in each layer: four arrays of the width, three of the query
  heads, keys and values, the attention scores, and four of the MLP.
  """
  heads = shape.num_heads * shape.head_dim
  of_token = (
      4 * shape.embed_dim
      + 3 * heads
      + 2 * shape.num_kv_heads * shape.head_dim
      + shape.num_heads * length
      + 4 * shape.mlp_dim
  )
  size = shape.compute_dtype.itemsize
  return _rows(config) * length * shape.num_layers * of_token * size


def _is_tree_large(config: ConfigDict, shape: GemmaConfig, kept: int) -> bool:
  """Whether a gradient of all weights takes more than activations do.

  Then the gradients of policy and critic had better not exist at once.
  """
  if config.lora.rank:
    return False
  return shape.num_params * shape.compute_dtype.itemsize > kept


def describe(given: ConfigDict, resolved: ConfigDict) -> str:
  """What auto became, as fields; '' where nothing said auto."""
  before, after = config_lib.flatten(given), config_lib.flatten(resolved)
  chosen = [f'{n}={after[n]}' for n in FIELDS if before[n] != after[n]]
  return f'chosen from sizes: {" ".join(chosen)}' if chosen else ''
