"""Tests of `models.vocabulary`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ma_rlhf_jax.models import gemma, vocabulary
from ma_rlhf_jax.structs import Params
from tests import tolerance
from tests.models.drawn import LENGTHS, TINY, draw, left_padded

PARAMS = draw('policy', TINY, seed=0)
TOKENS, MASK = left_padded(LENGTHS, 9)


def test_the_gradient_of_a_look_up_is_added_to_that_of_the_head() -> None:
  @functools.partial(jax.jit, static_argnums=1)
  @jax.grad
  def grads(params: Params, given: bool) -> jax.Array:
    hidden, head = gemma.hidden_and_head(TINY, params, TOKENS, MASK)
    head = head if given else params['embedding']
    return jnp.sum(jnp.sin(hidden[:, -1] @ head.T))

  bounds = tolerance.of_sums(lambda p: grads(p, False), (PARAMS,), 50)
  tolerance.assert_close(grads(PARAMS, True), grads(PARAMS, False), bounds)


def test_head_logits_by_hand() -> None:
  hidden = np.array([[1.0, 2.0], [0.5, -1.0]])
  embedding = np.array([[3.0, 4.0], [5.0, 6.0], [-1.0, 0.25]])
  head = jax.jit(vocabulary.head_logits, static_argnames='softcap')
  logits = head(hidden, embedding, softcap=0.0)
  # 3 + 8, 5 + 12, -1 + .5; 1.5 - 4, 2.5 - 6, -.5 - .25
  by_hand = np.array([[11.0, 17.0, -0.5], [-2.5, -3.5, -0.75]])
  np.testing.assert_allclose(logits, by_hand)
  capped = head(hidden, embedding, softcap=4.0)
  want = 4 * np.tanh(by_hand / 4)
  np.testing.assert_allclose(capped, want, rtol=20 * 2.0**-24)  # roundings
