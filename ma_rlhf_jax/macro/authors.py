"""What the authors' code does to macro actions, and nobody else.

Their boundaries are start positions that end with the last column of the
response, listed a second time where the rule already stood there:

  column       0  1  2  3  4  5  6        R = 7 columns, n = 3, R - 1 = 2 n
  boundaries   0        3        6 6
  our starts   1  0  0  1  0  0  1        the last column is always alone
  empty step                     ^        before macro action 2

The empty step has reward 0 and value 0 and no token, and it is a step of their
GAE. R is the number of columns they padded a response to. Generation of one
response at a time stops at its end, so in training R is its length L; where
R > L their last column is padding.

Source: ernie-research/MA-RLHF, dschat/rlhf/ppo_trainer.py (arXiv 2410.02743).
"""

import chex
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.structs import Array


def _columns(x_BT: Array) -> Array:
  return jnp.arange(x_BT.shape[1], dtype=jnp.int32)[None]


def ppl(logprobs_BT: Array, mask_BT: Array) -> Array:
  """Opens a macro action one token before each rise of the perplexity.

  Where token t + 1 has a higher nll than token t, t opens; the second token of
  a response is the first that can.

  Args:
    logprobs_BT: float, nats; anything on padding.
    mask_BT: bool, true on real response tokens.

  Returns:
    bool [B, T], true where a macro action opens.

  Source: their rule given a flat list. Their loop gives it a nested one, so
  that it never cuts, which is `fixed` with n = infinity.
  """
  chex.assert_equal_shape([logprobs_BT, mask_BT])
  rises_BT = logprobs_BT[:, 1:] < logprobs_BT[:, :-1]
  rises_BT = jnp.pad(rises_BT & mask_BT[:, 1:], ((0, 0), (0, 1)))
  first_BT = masking.positions(mask_BT) == 0
  return mask_BT & (rises_BT | first_BT)


def last_column_alone(
    starts_BT: Array, mask_BT: Array, width_B: Array
) -> tuple[Array, Array]:
  """Their last macro action: one column, with an empty step where it was due.

  Args:
    starts_BT: bool, true where the rule opens a macro action, the first column
      included.
    mask_BT: bool, true on real response tokens, from column 0 on.
    width_B: int32 >= 1, R of each row.

  Returns:
    starts_BT: bool, true also in column R - 1; padding included.
    empty_B: int32, the macro action before which the empty step comes; T where
      there is none, or none before a real token.
  """
  chex.assert_equal_shape([starts_BT, mask_BT])
  chex.assert_shape(width_B, (mask_BT.shape[0],))
  last_BT = _columns(mask_BT) == width_B[:, None] - 1
  real_B = jnp.any(starts_BT & last_BT & mask_BT, axis=1)
  before_B = jnp.sum(starts_BT & ~last_BT & mask_BT, axis=1, dtype=jnp.int32)
  none = jnp.int32(mask_BT.shape[1])
  return starts_BT | last_BT, jnp.where(real_B, before_B, none)


def insert_empty_steps(x_BM: Array, empty_B: Array) -> Array:
  """[B, M + 1]: macro actions with a zero (false) before the `empty`-th.

  # in: 5 7 9, empty 1   out: 5 0 7 9
  """
  column_1S = jnp.arange(x_BM.shape[1] + 1, dtype=jnp.int32)[None]
  empty_B1 = empty_B[:, None]
  later_BS = jnp.pad(x_BM, ((0, 0), (1, 0)))
  now_BS = jnp.pad(x_BM, ((0, 0), (0, 1)))
  x_BS = jnp.where(column_1S < empty_B1, now_BS, later_BS)
  zero = jnp.zeros((), x_BM.dtype)
  return jnp.where(column_1S == empty_B1, zero, x_BS)


def remove_empty_steps(x_BS: Array, empty_B: Array) -> Array:
  """[B, M]: what `insert_empty_steps` was given."""
  column_1M = jnp.arange(x_BS.shape[1] - 1, dtype=jnp.int32)[None]
  return jnp.where(column_1M < empty_B[:, None], x_BS[:, :-1], x_BS[:, 1:])
