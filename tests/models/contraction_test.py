"""The product with a kernel and its gradients, against `jnp.tensordot`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.models.contraction import contract
from ma_rlhf_jax.planning import flops

_SHAPES = [
    ((2, 7, 6), (6, 4), 1),  # the gradient's smaller side is the output's
    ((2, 7, 4), (4, 3, 5), 1),
    ((2, 7, 3, 5), (3, 5, 4), 2),
    ((7, 4), (4, 9), 1),
]


def _drawn(*shapes: tuple[int, ...]) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(('x_shape', 'kernel_shape', 'count'), _SHAPES)
def test_product_and_gradients_are_those_of_tensordot(
    x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], count: int
) -> None:
  x, kernel = _drawn(x_shape, kernel_shape)

  def loss(product, x, kernel):
    return jnp.sum(jnp.sin(product(x, kernel, count)))

  plain = lambda x, kernel, count: jnp.tensordot(x, kernel, axes=count)
  found, want = (
      jax.jit(jax.value_and_grad(loss, (1, 2)), static_argnums=0)(f, x, kernel)
      for f in (contract, plain)
  )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_have_the_dtypes_of_what_they_belong_to() -> None:
  x, kernel = _drawn((2, 7, 4), (4, 9))
  loss = lambda x, kernel: jnp.sum(contract(x, kernel, 1) ** 2)
  grads = jax.grad(loss, (0, 1))(x, kernel.astype(jnp.bfloat16))
  assert [g.dtype for g in grads] == [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize(('platform', 'count'), [('cpu', 1), ('tpu', 0)])
def test_only_cpus_are_given_a_transposed_copy(
    platform: str, count: int
) -> None:
  x, kernel = _drawn((2, 7, 4), (4, 9))
  grad = jax.jit(jax.grad(lambda k: jnp.sum(contract(x, k, 1) ** 2)))
  lowered = grad.trace(kernel).lower(lowering_platforms=(platform,))
  assert lowered.as_text().count('optimization_barrier') == count


def test_a_kernel_that_does_not_learn_costs_no_gradient() -> None:
  x, kernel = _drawn((7, 4), (4, 9))
  once = 2 * 7 * 4 * 9
  loss = lambda x, kernel: jnp.sum(jnp.sin(contract(x, kernel, 1)))
  for learning, products in (((0, 1), 3), (0, 2)):
    jaxpr = jax.make_jaxpr(jax.grad(loss, learning))(x, kernel)
    assert flops.count(jaxpr) == products * once
