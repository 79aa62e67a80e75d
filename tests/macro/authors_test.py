"""Quirks of the authors' macro actions, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import authors, termination
from ma_rlhf_jax.objective import advantage
from tests import tiny
from tests.authors import columns

SETTINGS = termination.TerminationSettings(
    'fixed', ngram=2, last_token_alone=True, empty_step=True
)
segment = jax.jit(termination.segment, static_argnums=1)
macro_gae = jax.jit(advantage.macro_gae, static_argnums=3)
last_column_alone = jax.jit(authors.last_column_alone)


def _mask(*lengths: int, columns: int = 6) -> jax.Array:
  return jnp.arange(columns)[None] < jnp.asarray(lengths)[:, None]


def _segment(mask: jax.Array) -> termination.MacroActions:
  keys = jax.random.split(jax.random.key(0), len(mask))
  nothing = jnp.full(mask.shape, jnp.nan)
  return segment(termination.TerminationInputs(mask, nothing, keys), SETTINGS)


def test_the_last_token_is_alone_and_an_empty_step_comes_where_a_cut_was_due():
  # 6 = 2 + 2 + 1 + 1, no cut due at the last; 5 = 2 + 2 + 1, due; 1: due; 0.
  macro = _segment(_mask(6, 5, 1, 0))
  assert macro.ids_BT.tolist() == [
      [0, 0, 1, 1, 2, 3],
      [0, 0, 1, 1, 2, 6],
      [0, 6, 6, 6, 6, 6],
      [6, 6, 6, 6, 6, 6],
  ]
  assert macro.empty_B.tolist() == [6, 2, 0, 6]


def test_without_empty_steps_the_last_token_is_still_alone():
  mask = _mask(5)
  keys = jax.random.split(jax.random.key(0), 1)
  macro = segment(
      termination.TerminationInputs(mask, jnp.zeros(mask.shape), keys),
      termination.TerminationSettings('fixed', ngram=0, last_token_alone=True),
  )
  assert macro.empty_B is None
  assert macro.ids_BT.tolist() == [[0, 0, 0, 0, 1, 6]]


def test_wider_rows_have_their_last_macro_action_in_the_padding():
  # R = 6, L = 4, n = 2: columns 0 2 4 and the last, 5, a pad.
  mask, width = _mask(4, 5), jnp.array([6, 6])
  counted = columns.counted(mask, width)
  np.testing.assert_array_equal(counted, _mask(5, 6))
  starts = termination.fixed(counted, ngram=2)
  opens, empty = last_column_alone(starts, mask, width)
  assert opens.astype(int).tolist() == [[1, 0, 1, 0, 1, 1]] * 2
  assert empty.tolist() == [6, 6]  # before no real token
  assert columns.score_column(mask, width).tolist() == [4, 5]


def test_perplexity_opens_one_token_too_early():
  # nll 1 3 2 5 5 4: rises at 1 and 3 open 0 and 2.
  logprobs = -jnp.array([[1.0, 3, 2, 5, 5, 4], [1, 3, 2, 5, 5, 9]])
  mask = _mask(6, 5)
  got = authors.ppl(jnp.where(mask, logprobs, jnp.nan), mask)
  assert got.astype(int).tolist() == [[1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize('empty', [0, 1, 2, 3])
def test_empty_steps_come_and_go(empty: int):
  x = jnp.array([[5.0, 7, 9]])
  empty_B = jnp.array([empty])
  wide = authors.insert_empty_steps(x, empty_B)
  assert wide.tolist() == [np.insert([5.0, 7, 9], empty, 0).tolist()]
  np.testing.assert_array_equal(authors.remove_empty_steps(wide, empty_B), x)


def test_an_empty_step_enters_the_estimation_by_hand():
  # n = 2, L = 5; means 1 2 and 3 alone; values 2 4 | 5. With the empty step:
  #   A_last = 3 - 5 = -2;  A_empty = 0 + 5 - 0 + .5 * -2 = 4
  #   A_1 = 2 + 0 - 4 + .5 * 4 = 0;  A_0 = 1 + 4 - 2 + .5 * 0 = 3
  macro = _segment(_mask(5, columns=5))
  rewards = jnp.array([[0.5, 1.5, 4, 0, 3]])
  values = jnp.array([[1.0, 3, 4, 4, 5]])
  got, returns = macro_gae(
      values,
      rewards,
      macro,
      tiny.objective(
          gamma=1.0,
          gae_lambda=0.5,
          discount='macro',
          pool_rewards='mean',
          pool_values='equal',
      ),
  )
  assert got.tolist() == [[3, 0, -2, 0, 0]]
  assert returns.tolist() == [[5, 4, 3, 0, 0]]
