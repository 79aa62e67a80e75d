"""The token layout, and sums and means that see real tokens only.

One layout serves every stage, so that response columns are a static slice:

  column     0   1   2   3   4  | 5   6   7   8        P = 5, T = 4, L = 9
  tokens    pad pad bos Hi  !   | Hey yo  eos pad
  mask       0   0   1   1   1  | 1   1   1   0
  positions  0   0   0   1   2  | 3   4   5   6        rotary positions

Column c predicts the token of column c + 1, so the response token t is
predicted from column P - 1 + t: the critic's value of the state in which it is
chosen, and the hidden state its log-prob is computed from, are read there. The
score is read at the last real token (column 7 above).
"""

import chex
import jax
import jax.numpy as jnp

from ma_rlhf_jax.structs import Array, SequenceBatch


def wide(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype reductions run in: float32, or `dtype` where that is wider."""
  return jnp.promote_types(dtype, jnp.float32)


def positions(mask_BL: Array) -> Array:
  """int32 [B, L]: columns since the first real token of the row; >= 0.

  Padding on the right counts on, as it does in the reference implementation.
  """
  index_L = jnp.arange(mask_BL.shape[-1], dtype=jnp.int32)
  first_B1 = jnp.argmax(mask_BL, axis=-1, keepdims=True).astype(jnp.int32)
  return jnp.maximum(index_L[None] - first_B1, 0)


def causal_mask(mask_BL: Array) -> Array:
  """bool [B, L, L]: query q may attend to the real keys at or before q."""
  length = mask_BL.shape[-1]
  causal_LL = jnp.tril(jnp.ones((length, length), dtype=bool))
  return causal_LL[None] & mask_BL[:, None, :]


def join(
    prompt_tokens_BP: Array,
    prompt_mask_BP: Array,
    response_tokens_BT: Array,
    response_mask_BT: Array,
) -> SequenceBatch:
  """Prompt columns followed by response columns."""
  return SequenceBatch(
      tokens_BL=jnp.concatenate([prompt_tokens_BP, response_tokens_BT], -1),
      mask_BL=jnp.concatenate([prompt_mask_BP, response_mask_BT], -1),
      response_mask_BT=response_mask_BT,
  )


def response_tokens(sequences: SequenceBatch) -> Array:
  """int32 [B, T]: the response columns of the tokens."""
  return sequences.tokens_BL[:, -sequences.response_mask_BT.shape[1] :]


def predictors(x_BLx: Array, response_len: int) -> Array:
  """The T columns of `x` from which the response tokens are predicted."""
  return x_BLx[:, -response_len - 1 : -1]


def lengths(mask_BL: Array) -> Array:
  """int32 [B]: real tokens of each row."""
  return jnp.sum(mask_BL, axis=-1, dtype=jnp.int32)


def compacted(
    sequences: SequenceBatch, width: int
) -> tuple[Array, Array, Array]:
  """Rows without the padding before them, and where responses are predicted.

    column     0   1   2   3   4   5   6        the row above, width = 7
    tokens    bos Hi  !   Hey yo  eos pad
    predicts              0   1   2   3         response token t from column ...

  Args:
    sequences: rows of at most `width` real tokens.
    width: W.

  Returns:
    tokens_BW, mask_BW, and int32 [B, min(T, W)], the column from which each
    response token is predicted.
  """
  total = sequences.mask_BL.shape[1]
  response_len = sequences.response_mask_BT.shape[1]
  first_B1 = jnp.argmax(sequences.mask_BL, axis=-1, keepdims=True)
  first_B1 = first_B1.astype(jnp.int32)
  from_BW = first_B1 + jnp.arange(width, dtype=jnp.int32)[None]
  take = lambda x: jnp.take_along_axis(
      x, jnp.minimum(from_BW, total - 1), axis=1
  )
  mask_BW = take(sequences.mask_BL) & (from_BW < total)
  token = jnp.arange(min(response_len, width), dtype=jnp.int32)[None]
  predicts_BT = total - response_len - first_B1 - 1 + token
  return (
      take(sequences.tokens_BL),
      mask_BW,
      jnp.clip(predicts_BT, 0, width - 1),
  )


def last_real(mask_BL: Array) -> Array:
  """int32 [B]: column of the last real token; 0 in a row without one."""
  length = mask_BL.shape[-1]
  index_L = jnp.arange(length, dtype=jnp.int32)
  return jnp.max(jnp.where(mask_BL, index_L, 0), axis=-1)


def at_index(x_BL: Array, index_B: Array) -> Array:
  """`x[b, index[b]]` for every row b."""
  return jnp.take_along_axis(x_BL, index_B[:, None], axis=1)[:, 0]


def end_scores(scores_BL: Array, mask_BL: Array) -> Array:
  """The score at the last real token of each row; 0 in a row without one."""
  chex.assert_equal_shape([scores_BL, mask_BL])
  scores_B = at_index(scores_BL, last_real(mask_BL))
  scores_B = scores_B.astype(wide(scores_BL.dtype))
  return jnp.where(jnp.any(mask_BL, axis=1), scores_B, 0)


def left_align(x_BL: Array, mask_BL: Array) -> Array:
  """Rolls each row left until its first real token is in column 0.

  # in:  pad pad bos Hi  eos pad   out: bos Hi  eos pad pad pad
  """
  chex.assert_equal_shape([x_BL, mask_BL])
  return jax.vmap(lambda x, m: jnp.roll(x, -jnp.argmax(m)))(x_BL, mask_BL)


def masked_sum(x: Array, mask: Array, axis: int | None = None) -> Array:
  """Sum over real entries, at least in float32; padding may hold nan."""
  return jnp.sum(
      jnp.where(mask, x, 0), axis=axis, dtype=wide(jnp.result_type(x))
  )


def masked_mean(x: Array, mask: Array, axis: int | None = None) -> Array:
  """Mean over real entries; 0 where there is none."""
  count = jnp.sum(mask, axis=axis, dtype=wide(jnp.result_type(x)))
  return masked_sum(x, mask, axis) / jnp.maximum(count, 1)


def masked_whiten(
    x: Array, mask: Array, *, shift_mean: bool = True, eps: float = 1e-8
) -> Array:
  """`(x - mean) / sqrt(var + eps)` over all real entries; 0 on padding.

  Args:
    x: any float array.
    mask: bool, same shape.
    shift_mean: when false the mean is added back.
    eps: added to the variance, in units of x squared.
  """
  x = jnp.where(mask, x, 0)
  mean = masked_mean(x, mask)
  variance = masked_mean(jnp.square(x - mean), mask)
  white = (x - mean) * jax.lax.rsqrt(variance + eps)
  return jnp.where(mask, white if shift_mean else white + mean, 0)
