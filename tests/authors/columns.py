"""Which columns the authors' code counts, and where it adds the score."""

import chex
import jax.numpy as jnp

from ma_rlhf_jax.structs import Array


def _columns(mask_BT: Array) -> Array:
  return jnp.arange(mask_BT.shape[1], dtype=jnp.int32)[None]


def counted(mask_BT: Array, width_B: Array) -> Array:
  """bool [B, T]: the columns in which their rules of length count tokens.

  These are one more than there are tokens, where there is padding, because
  they look for the column at which a macro action has ended.

  Args:
    mask_BT: bool, true on real response tokens, from column 0 on.
    width_B: int32, R of each row.
  """
  chex.assert_rank([mask_BT, width_B], [2, 1])
  last_B = jnp.minimum(jnp.sum(mask_BT, axis=1), width_B - 1)
  return _columns(mask_BT) <= last_B[:, None]


def score_column(mask_BT: Array, width_B: Array) -> Array:
  """int32 [B]: where they add the score; a pad where R > L, so it is lost."""
  tokens_B = jnp.sum(mask_BT, axis=1, dtype=jnp.int32)
  return jnp.minimum(tokens_B, width_B - 1)
