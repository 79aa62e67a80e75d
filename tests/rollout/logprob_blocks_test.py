"""Blocks of the vocabulary: the values, the gradients and what they cost."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.planning import flops
from ma_rlhf_jax.rollout import logprob_blocks as lib

Array = jax.Array
N, D, V = 24, 6, 600


def _inputs() -> tuple[Array, Array, Array]:
  random = np.random.default_rng(0)
  hidden, table = random.normal(size=(N, D)), random.normal(size=(V, D))
  # The first and the last of every block that a test cuts are among them.
  edges = [0, 127, 128, 383, 384, 511, 512, 599]
  tokens = np.concatenate([edges, random.integers(0, V, N - len(edges))])
  return (
      jnp.asarray(hidden, jnp.float32),
      jnp.asarray(table, jnp.float32),
      jnp.asarray(tokens, jnp.int32),
  )


def _settings(chunk_tokens: int, **more: object) -> lib.Settings:
  given = {'softcap': 2.0, 'temperature': 0.7, 'with_entropy': True, **more}
  return lib.Settings(chunk_tokens=chunk_tokens, **given)


def _plain(hidden: Array, table: Array, tokens: Array) -> tuple[Array, Array]:
  logits = 2.0 * jnp.tanh(hidden @ table.T / 2.0) / 0.7
  logp = jax.nn.log_softmax(logits)
  entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
  return jnp.take_along_axis(logp, tokens[:, None], axis=-1)[:, 0], entropy


def _cost(
    function: object, hidden: Array, table: Array, tokens: Array
) -> tuple:
  found = function(hidden, table, tokens)
  weights = jnp.cos(jnp.arange(N))
  return jnp.sum(weights * (found[0] - 0.3 * found[1])), found


# Blocks of 600 * chunk / 24 rows, made even and cut to whole lanes.
@pytest.mark.parametrize(
    ('chunk_tokens', 'blocks'),
    [(24, [600]), (16, [256, 256, 88]), (8, [128] * 4 + [88]), (4, [100] * 6)],
)
def test_blocks_and_a_rest_give_the_log_probs_and_gradients_of_all_logits(
    chunk_tokens: int, blocks: list[int]
) -> None:
  settings, inputs = _settings(chunk_tokens), _inputs()
  made = lambda *args: lib.block_logprobs(*args, settings)
  run = lambda f: jax.value_and_grad(
      functools.partial(_cost, f), argnums=(0, 1), has_aux=True
  )
  got, want = jax.jit(run(made))(*inputs), run(_plain)(*inputs)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
      got,
      want,
  )
  text = str(jax.make_jaxpr(made)(*inputs))
  widths = {int(n) for n in re.findall(rf'f32\[{N},(\d+)\]', text)} - {1, D}
  assert widths == set(blocks)


def test_a_table_that_does_not_learn_costs_no_gradient() -> None:
  hidden, table, tokens = _inputs()
  made = lambda *args: lib.block_logprobs(*args, _settings(8))
  cost = lambda *args: _cost(made, *args)[0]
  count = lambda f: flops.count(jax.make_jaxpr(f)(hidden, table, tokens))
  product = 2 * N * V * D
  # Forward and again; then to the hidden states, and to the table.
  assert count(cost) == product
  assert count(jax.grad(cost, argnums=(0, 1))) == 4 * product
  assert count(jax.grad(cost, argnums=0)) == 3 * product


def test_large_logits_keep_their_probabilities() -> None:
  # 3,000 plus the logarithm of a sum, in one number, would be off by 1e-4.
  table = jnp.log(jnp.array([[1.0], [2.0], [5.0]])) + 3000.0
  cost = lambda table: jnp.sum(
      lib.block_logprobs(
          jnp.ones((2, 1)),
          table,
          jnp.array([2, 2]),
          _settings(2, softcap=0.0, temperature=1.0),
      )[0]
  )
  want = jax.nn.softmax(table[:, 0] - 3000.0)
  got = jax.grad(cost)(table)[:, 0]
  np.testing.assert_allclose(got, 2 * (jnp.eye(3)[2] - want), atol=2e-6)


def test_what_is_not_used_has_no_gradient() -> None:
  inputs = _inputs()
  made = lambda *args: lib.block_logprobs(*args, _settings(8))
  for index in (0, 1):
    grad = lambda f: jax.grad(lambda *a: jnp.sum(f(*a)[index]))(*inputs)  # noqa: B023
    np.testing.assert_allclose(grad(made), grad(_plain), rtol=1e-4, atol=1e-5)
  without = _settings(8, with_entropy=False)
  silent = lambda *args: jnp.sum(lib.block_logprobs(*args, without)[1])
  assert not jax.grad(silent)(*inputs).any()
