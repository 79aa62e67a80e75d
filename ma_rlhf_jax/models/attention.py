"""Attention over keys and values that may come from a cache."""

import chex
import jax
import jax.numpy as jnp

from ma_rlhf_jax.masking import wide
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
      keys_BSKH,
      preferred_element_type=wide(grouped.dtype),
  )
  scores = soft_capped(scores, softcap)
  floor = jnp.finfo(scores.dtype).min
  scores = jnp.where(mask_BLS[:, None, None], scores, floor)
  weights = jax.nn.softmax(scores, axis=-1).astype(queries_BLNH.dtype)
  mixed = jnp.einsum('bkgls,bskh->blkgh', weights, values_BSKH)
  return mixed.reshape(batch, length, heads, size)
