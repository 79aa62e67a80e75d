"""Low-rank adapters: which parameters learn, and what they add to a kernel.

A model with adapters has one tree in which each target kernel W [*inputs,
*outputs] is followed by A [*inputs, rank] and B [rank, *outputs]:

  layers/attention/query          frozen
  layers/attention/query_lora_a   learns
  layers/attention/query_lora_b   learns

Scalar heads learn too. `split` takes such a tree apart, so that optimizer and
checkpoints see the learning part only and the frozen part is shared with the
model that it came from; `join` puts it together again. Without adapters
everything learns and nothing is frozen.

Source: LoRA, arXiv 2106.09685.
"""

from collections.abc import Callable

from flax import traverse_util
import jax
import jax.numpy as jnp

from ma_rlhf_jax.models import heads
from ma_rlhf_jax.models.gemma import LORA_A, LORA_B
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.structs import Array, Params

Flat = dict[str, Array]


def flatten(params: Params) -> Flat:
  """Path, its parts joined by '/', -> array."""
  return traverse_util.flatten_dict(params, sep='/')


def unflatten(flat: Flat) -> Params:
  """The inverse of `flatten`."""
  return traverse_util.unflatten_dict(flat, sep='/')


def _is_adapter(path: str) -> bool:
  return path.endswith((LORA_A, LORA_B))


def _part(params: Params, belongs: Callable[[str], bool]) -> Params:
  return unflatten({k: x for k, x in flatten(params).items() if belongs(k)})


def split(config: GemmaConfig, params: Params) -> tuple[Params, Params]:
  """(frozen, learning): two trees that `join` makes one again.

  Args:
    config: without `lora` everything learns.
    params: of a policy or a scalar model.
  """
  if config.lora is None:
    return {}, params
  learns = lambda path: _is_adapter(path) or path == 'head'
  return _part(params, lambda path: not learns(path)), _part(params, learns)


def join(frozen: Params, learning: Params) -> Params:
  """One tree of both; no array is touched."""
  if not frozen:
    return learning
  return unflatten({**flatten(frozen), **flatten(learning)})


def add_adapters(
    kind: str, config: GemmaConfig, params: Params, key: Array
) -> Params:
  """`params` with fresh adapters, which change nothing before they learn.

  Args:
    kind: 'policy' or 'scalar'.
    config: with `lora`; without it `params` are returned as they are.
    params: of that shape, without adapters; all but a head are shared, not
      copied.
    key: random key, used once.
  """
  if config.lora is None:
    return params
  fresh = heads.init_params(kind, config, key, keep=_is_adapter)
  if kind == 'scalar':  # it learns here and stays as it is there
    fresh['head'] = jnp.copy(params['head'])
  return join(params, fresh)


def adapters(params: Params, path: str) -> tuple[Array, Array] | None:
  """A and B of the kernel at `path` of a flat tree; None where it has none."""
  if path + LORA_A not in params:
    return None
  return params[path + LORA_A], params[path + LORA_B]


def merged(kernel: Array, a: Array, b: Array, scale: float) -> Array:
  """`kernel + scale * A B` of one layer, summed in float32 or wider.

  Args:
    kernel: [*inputs, *outputs].
    a: [*inputs, rank].
    b: [rank, *outputs].
    scale: alpha / rank.

  Returns:
    The sum, in float32 or in the dtype of the kernel where that is wider.
  """
  dtype = jnp.promote_types(kernel.dtype, jnp.float32)
  product = jnp.tensordot(
      a.astype(dtype), b.astype(dtype), axes=1, precision='highest'
  )
  return kernel.astype(dtype) + scale * product


def without_adapters(params: Params) -> Params:
  """The tree without A and B; the kernels stay as they are."""
  return _part(params, lambda path: not _is_adapter(path))


def num_learning(config: GemmaConfig, params: Params) -> tuple[int, int]:
  """(parameters that learn, parameters in all)."""
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  frozen, learning = split(config, params)
  return count(learning), count(frozen) + count(learning)


def describe(config: GemmaConfig, params: Params) -> str:
  """What learns: 'all 1,024 parameters', or adapters and their number."""
  learning, total = num_learning(config, params)
  if config.lora is None:
    return f'all {total:,} parameters'
  return (
      f'rank-{config.lora.rank} adapters, {learning:,} of {total:,} parameters'
  )
