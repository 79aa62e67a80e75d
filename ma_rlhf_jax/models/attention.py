"""Attention over keys and values that may come from a cache."""

import functools
from typing import NamedTuple

import chex
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from ma_rlhf_jax.masking import causal_mask, wide
from ma_rlhf_jax.models import kernels
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.partition import machine
from ma_rlhf_jax.structs import Array


def rotate(x_BLNH: Array, positions_BL: Array, *, theta: float) -> Array:
  """Rotary position embedding (arXiv 2104.09864), halves rotated together.

    out = [x1 cos - x2 sin, x2 cos + x1 sin],  x1, x2 = the halves of x
    angle[p, i] = p * theta ** (-2 i / H),     i = 0 .. H/2 - 1

  Computed in float32 or wider and returned in the dtype of `x`.
  """
  chex.assert_rank([x_BLNH, positions_BL], [4, 2])
  dtype = wide(x_BLNH.dtype)
  half = x_BLNH.shape[-1] // 2
  frequency_h = theta ** (-jnp.arange(half, dtype=dtype) / half)
  positions_BL11 = positions_BL[:, :, None, None].astype(dtype)
  angle_BL1h = positions_BL11 * frequency_h[None, None, None]
  sin, cos = jnp.sin(angle_BL1h), jnp.cos(angle_BL1h)
  x1, x2 = jnp.split(x_BLNH.astype(dtype), 2, axis=-1)
  rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
  return rotated.astype(x_BLNH.dtype)


def soft_capped(x: Array, cap: float) -> Array:
  """`cap * tanh(x / cap)`, which stays within +-cap; `x` where cap is 0."""
  return cap * jnp.tanh(x / cap) if cap else x


def attend(
    queries_BLNH: Array,
    keys_BSKH: Array,
    values_BSKH: Array,
    mask_BLS: Array,
    *,
    scale: float,
    softcap: float = 0.0,
    key_scales_BSK: Array | None = None,
    value_scales_BSK: Array | None = None,
) -> Array:
  """Softmax attention; each key head serves N / K query heads.

  A query that may attend to nothing gets the mean of all values, never nan.

  Args:
    queries_BLNH: float queries.
    keys_BSKH: float keys.
    values_BSKH: float values.
    mask_BLS: bool, true where query l may attend to key s.
    scale: multiplies the dot products.
    softcap: see `soft_capped`.
    key_scales_BSK: what int8 keys are multiplied by; None = keys are floats.
    value_scales_BSK: what int8 values are multiplied by.

  Returns:
    float [B, L, N, H], in the dtype of the queries.
  """
  chex.assert_rank([queries_BLNH, keys_BSKH, mask_BLS], [4, 4, 3])
  batch, length, heads, size = queries_BLNH.shape
  kv_heads = keys_BSKH.shape[2]
  grouped = queries_BLNH.reshape(
      batch, length, kv_heads, heads // kv_heads, size
  )
  scores = jnp.einsum(
      'blkgh,bskh->bkgls',
      grouped * jnp.asarray(scale, grouped.dtype),
      keys_BSKH.astype(grouped.dtype),
      preferred_element_type=wide(grouped.dtype),
  )
  # Scales multiply what a product gives: 8 bits are all that is read for it.
  over_scores = lambda scales: jnp.swapaxes(scales, 1, 2)[:, :, None, None]
  if key_scales_BSK is not None:
    scores = scores * over_scores(key_scales_BSK)
  scores = soft_capped(scores, softcap)
  floor = jnp.finfo(scores.dtype).min
  scores = jnp.where(mask_BLS[:, None, None], scores, floor)
  weights = jax.nn.softmax(scores, axis=-1)
  if value_scales_BSK is not None:
    weights = weights * over_scores(value_scales_BSK)
  dtype = queries_BLNH.dtype
  mixed = jnp.einsum(
      'bkgls,bskh->blkgh', weights.astype(dtype), values_BSKH.astype(dtype)
  )
  return mixed.reshape(batch, length, heads, size)


class Masks(NamedTuple):
  """What queries may attend to.

  Attributes:
    full: bool [B, L, S], in most layers; or [B, L], the real tokens of rows for
      a kernel that knows that attention is causal.
    sliding: the same in sliding layers; None where it would be no different.
  """

  full: Array
  sliding: Array | None

  @classmethod
  def of(cls, config: GemmaConfig, mask: Array, slot: Array | int) -> 'Masks':
    """Both masks; `slot` is the key slot of the first query."""
    slides, window = any(config.sliding_layers), config.sliding_window
    if mask.ndim == 2 and kernels.chosen(config, machine()) != 'xla':
      return cls(mask, mask if slides and mask.shape[1] > window else None)
    mask_BLS = causal_mask(mask) if mask.ndim == 2 else mask
    length, slots = mask_BLS.shape[1:]
    if not slides or slots <= window:
      return cls(mask_BLS, None)
    query_L1 = slot + jnp.arange(length, dtype=jnp.int32)[:, None]
    key_1S = jnp.arange(slots, dtype=jnp.int32)[None]
    near_LS = query_L1 - key_1S < window
    return cls(mask_BLS, mask_BLS & near_LS[None])

  def attend(
      self,
      config: GemmaConfig,
      slides: Array,
      *projected: Array,
      **scales: Array,
  ) -> Array:
    """Attention in one layer.

    Args:
      config: of the model.
      slides: whether the layer is a sliding one.
      *projected: queries, keys and values.
      **scales: of int8 keys and values, see `attend`.
    """
    how = {'scale': config.attention_scale, 'softcap': config.attn_softcap}
    if self.full.ndim == 3:
      mask = self.full
      if self.sliding is not None:
        mask = jnp.where(slides, self.sliding, self.full)
      return checkpoint_name(
          attend(*projected, mask, **how, **scales), kernels.SAVED
      )
    kernel = kernels.KERNELS[kernels.chosen(config, machine())]
    rows = functools.partial(kernels.attend_rows, kernel, **how)
    if self.sliding is None:
      return rows(*projected, self.full, window=0)
    return jax.lax.cond(
        slides,
        functools.partial(rows, window=config.sliding_window),
        functools.partial(rows, window=0),
        *projected,
        self.full,
    )
