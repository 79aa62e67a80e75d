"""Pools token quantities into macro actions and spreads them back.

  x       2   4   6 | 1   3 | pad          ids 0 0 0 1 1 T
  pool    12  4  0  0  0  0                weights='sum', M = T columns
  spread  12  12  12  4  4  0

Entries of `x_BM` past the last macro action of a row are 0.
"""

from collections.abc import Callable

import chex
import jax
from jax import lax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.structs import Array, MacroActions


def _segment_sum(x_BT: Array, macro: MacroActions) -> Array:
  """Sum over each macro action, [B, M]; ids of T fall off the end."""
  num_segments = x_BT.shape[1]
  add = lambda x, ids: jax.ops.segment_sum(x, ids, num_segments=num_segments)
  return jax.vmap(add)(x_BT, macro.ids_BT)


def lengths(macro: MacroActions) -> Array:
  """int32 [B, M], tokens in each macro action; 0 past the last one."""
  return _segment_sum(macro.mask_BT.astype(jnp.int32), macro)


def macro_mask(macro: MacroActions) -> Array:
  """bool [B, M], true on macro actions that exist."""
  return lengths(macro) > 0


def spread(x_BM: Array, macro: MacroActions) -> Array:
  """Each token's entry of `x_BM`, [B, T]; 0 on padding."""
  chex.assert_equal_shape([x_BM, macro.ids_BT])
  last = x_BM.shape[1] - 1
  ids_BT = jnp.minimum(macro.ids_BT, last)
  x_BT = jnp.take_along_axis(x_BM, ids_BT, axis=1)
  return jnp.where(macro.mask_BT, x_BT, 0)


def places(macro: MacroActions) -> tuple[Array, Array]:
  """Where each token stands in its macro action.

  Returns:
    offset_BT: int32, tokens of the macro action before this one; 0 on padding.
    length_BT: int32, tokens in the macro action; 1 on padding.
  """
  position_BT = masking.positions(macro.mask_BT)
  start_BT = lax.cummax(jnp.where(macro.starts_BT, position_BT, 0), axis=1)
  length_BT = spread(lengths(macro), macro)
  offset_BT = jnp.where(macro.mask_BT, position_BT - start_BT, 0)
  return offset_BT, jnp.where(macro.mask_BT, length_BT, 1)


def ends(macro: MacroActions) -> Array:
  """bool [B, T], true on the last token of each macro action."""
  offset_BT, length_BT = places(macro)
  return macro.mask_BT & (offset_BT == length_BT - 1)


def _position(offset_BT: Array, length_BT: Array, dtype: jnp.dtype) -> Array:
  """1 / ((length - offset) H), H = 1 + 1/2 + ... + 1/length."""
  counts_T = jnp.arange(1, length_BT.shape[1] + 1, dtype=dtype)
  harmonic_T = jnp.cumsum(1 / counts_T)
  left_BT = (length_BT - offset_BT).astype(dtype)
  return 1 / (left_BT * harmonic_T[length_BT - 1])


def _position_reversed(
    offset_BT: Array, length_BT: Array, dtype: jnp.dtype
) -> Array:
  """1 / ((offset + 1) H): `_position` from the other end."""
  return _position(length_BT - 1 - offset_BT, length_BT, dtype)


def _equal(offset_BT: Array, length_BT: Array, dtype: jnp.dtype) -> Array:
  return 1 / length_BT.astype(dtype)


def _start(offset_BT: Array, length_BT: Array, dtype: jnp.dtype) -> Array:
  return (offset_BT == 0).astype(dtype)


def _unit(offset_BT: Array, length_BT: Array, dtype: jnp.dtype) -> Array:
  return (offset_BT == length_BT - 1).astype(dtype)


def _sum(offset_BT: Array, length_BT: Array, dtype: jnp.dtype) -> Array:
  return jnp.ones_like(offset_BT, dtype)


Weights = Callable[[Array, Array, jnp.dtype], Array]
# sigma of each token from its place in the macro action.
REWARD_WEIGHTS: dict[str, Weights] = {
    'sum': _sum,  # paper
    'mean': _equal,
    'position_reversed': _position_reversed,  # authors' code
}
VALUE_WEIGHTS: dict[str, Weights] = {
    'start': _start,  # the macro action's first token: the SMDP value
    'equal': _equal,  # the paper's default for values
    'unit': _unit,  # the last token
    'position': _position,  # paper: later tokens weigh more
    'position_reversed': _position_reversed,  # authors' code: earlier ones do
}
WEIGHTS = REWARD_WEIGHTS | VALUE_WEIGHTS


def sigma(macro: MacroActions, weights: str, dtype: jnp.dtype) -> Array:
  """[B, T]: what each token counts in `pool`; 0 on padding."""
  sigma_BT = WEIGHTS[weights](*places(macro), dtype)
  return jnp.where(macro.mask_BT, sigma_BT, 0)


def pool(x_BT: Array, macro: MacroActions, *, weights: str) -> Array:
  """`sum_i sigma_i x_i` over the tokens of each macro action.

  Args:
    x_BT: float, per token; anything on padding.
    macro: the macro actions.
    weights: a key of `WEIGHTS`. `sum` for rewards and `start` for values are
      the SMDP quantities.

  Returns:
    float [B, M], at least float32; 0 past the last macro action.

  Source: arXiv 2410.02743, appendix D.1. Its `position` weighs the last token
  most; the authors' code has it reversed.
  """
  chex.assert_equal_shape([x_BT, macro.ids_BT])
  dtype = masking.wide(x_BT.dtype)
  sigma_BT = sigma(macro, weights, dtype)
  x_BT = jnp.where(macro.mask_BT, x_BT, 0).astype(dtype)
  return _segment_sum(sigma_BT * x_BT, macro)


def statistics(macro: MacroActions) -> dict[str, Array]:
  """How long and how many the macro actions of a batch are.

  Returns:
    float32 scalars, 0 where there is no macro action: `length_mean` and
    `length_p95` in tokens over all macro actions, and `per_response`, macro
    actions per response that has a token.
  """
  lengths_BM = lengths(macro).astype(jnp.float32)
  exists_BM = lengths_BM > 0
  count = jnp.sum(exists_BM, dtype=jnp.float32)
  rows = jnp.sum(jnp.any(macro.mask_BT, axis=1), dtype=jnp.float32)
  p95 = jnp.nanquantile(jnp.where(exists_BM, lengths_BM, jnp.nan), 0.95)
  return {
      'length_mean': masking.masked_mean(lengths_BM, exists_BM),
      'length_p95': jnp.where(count > 0, p95, 0),
      'per_response': count / jnp.maximum(rows, 1),
  }
