"""Activations times a kernel, with a backward pass that suits the platform.

The gradient of a kernel sums over all tokens: `x^T dy`. CPUs multiply that at
half speed, and XLA would transpose the larger of the two first. There the
smaller one is transposed, which leaves a plain product.
"""

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from ma_rlhf_jax.structs import Array

# The name of products for `jax.checkpoint_policies`.
PRODUCT = 'product'


def contract(x: Array, kernel: Array, count: int) -> Array:
  """`jnp.tensordot(x, kernel, axes=count)`, for reverse mode only.

  Args:
    x: [..., *inputs].
    kernel: [*inputs, *outputs].
    count: of axes in `inputs`.
  """
  return checkpoint_name(_contract(x, kernel, count), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract(x: Array, kernel: Array, count: int) -> Array:
  return jnp.tensordot(x, kernel, axes=count)


def _forward(
    x: Array, kernel: Array, count: int
) -> tuple[Array, tuple[Array, Array]]:
  return _contract(x, kernel, count), (x, kernel)


def _backward(
    count: int, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  batch = x.ndim - count
  outputs = tuple(range(batch, dy.ndim)), tuple(range(count, kernel.ndim))
  dx = jnp.tensordot(dy, kernel, axes=outputs)
  rows = tuple(range(batch))
  kernel_grad = jax.lax.platform_dependent(
      x,
      dy,
      cpu=functools.partial(_transposed, batch=batch),
      default=lambda x, dy: jnp.tensordot(x, dy, axes=(rows, rows)),
  )
  return dx.astype(x.dtype), kernel_grad.astype(kernel.dtype)


def _transposed(x: Array, dy: Array, batch: int) -> Array:
  """[*inputs, *outputs]: the gradient of the kernel, as a plain product."""
  inputs, outputs = x.shape[batch:], dy.shape[batch:]
  x_NI = x.reshape(-1, math.prod(inputs))
  dy_NO = dy.reshape(-1, math.prod(outputs))
  # XLA would merge a transposition with the product, and undo this.
  as_is = jax.lax.optimization_barrier
  if x_NI.shape[1] <= dy_NO.shape[1]:
    grad_IO = as_is(x_NI.T) @ dy_NO
  else:
    grad_IO = as_is(as_is(dy_NO.T) @ x_NI).T
  return grad_IO.reshape(*inputs, *outputs)


_contract.defvjp(_forward, _backward)
