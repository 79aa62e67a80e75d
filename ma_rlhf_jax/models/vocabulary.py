"""The vocabulary at both ends of a model: look-up and tied head.

Both have gradients of their own.
"""

import jax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.models.attention import soft_capped
from ma_rlhf_jax.structs import Array


@jax.custom_vjp
def look_up(embedding_VD: Array, tokens_BL: Array) -> tuple[Array, Array]:
  """Rows [B, L, D] of the table, and the table, for the head.

  The gradient that comes back through the latter is added to in place: apart,
  that of the rows would be a second array as large as the table.
  """
  return embedding_VD[tokens_BL], embedding_VD


def _look_up_forward(
    embedding_VD: Array, tokens_BL: Array
) -> tuple[tuple[Array, Array], Array]:
  return look_up(embedding_VD, tokens_BL), tokens_BL


def _look_up_backward(
    tokens_BL: Array, grads: tuple[Array, Array]
) -> tuple[Array, None]:
  rows_BLD, table_VD = grads
  return table_VD.at[tokens_BL].add(rows_BLD), None


look_up.defvjp(_look_up_forward, _look_up_backward)


@jax.custom_vjp
def _head(hidden_xD: Array, embedding_VD: Array) -> Array:
  """[..., V]: products of hidden states and rows, summed in float32 or wider.

  Its own gradient: by default that of a float32 result multiplies in float32,
  at a fraction of the speed. As everywhere else in the model, gradients enter
  matmuls in the compute dtype; the sums over tokens stay wide.
  """
  return jnp.einsum(
      '...d,vd->...v',
      hidden_xD,
      embedding_VD.astype(hidden_xD.dtype),
      preferred_element_type=masking.wide(hidden_xD.dtype),
  )


def _head_forward(
    hidden_xD: Array, embedding_VD: Array
) -> tuple[Array, tuple[Array, Array]]:
  return _head(hidden_xD, embedding_VD), (hidden_xD, embedding_VD)


def _head_backward(
    inputs: tuple[Array, Array], grad_xV: Array
) -> tuple[Array, Array]:
  hidden_xD, embedding_VD = inputs
  grad_xV = grad_xV.astype(hidden_xD.dtype)
  rows_VD = embedding_VD.astype(hidden_xD.dtype)
  return jnp.einsum('...v,vd->...d', grad_xV, rows_VD), jnp.einsum(
      '...v,...d->vd',
      grad_xV,
      hidden_xD,
      preferred_element_type=masking.wide(hidden_xD.dtype),
  ).astype(embedding_VD.dtype)


_head.defvjp(_head_forward, _head_backward)


def head_logits(
    hidden_xD: Array, embedding_VD: Array, *, softcap: float
) -> Array:
  """Logits [..., V] of the tied head, at least in float32.

  Args:
    hidden_xD: hidden states.
    embedding_VD: the embedding.
    softcap: `final_softcap` of the config; 0 = off.
  """
  return soft_capped(_head(hidden_xD, embedding_VD), softcap)
