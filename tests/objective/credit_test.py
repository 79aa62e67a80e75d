"""What each value rule does to credit, exactly, on a tree of tokens.

With an exact critic and a reward at the end, the expected gradient at offset k
of a macro action is the true one times sigma_0 + ... + sigma_k.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import aggregate, termination
from ma_rlhf_jax.objective import targets
from tests import tiny
from tests.objective import trees

VALUES = ('start', 'equal', 'unit', 'position', 'position_reversed')


def _weights(value: str, length: int) -> np.ndarray:
  """sigma of a macro action, from the definitions."""
  place = np.arange(1, length + 1)
  inverse = 1 / place
  return {
      'start': (place == 1) * 1.0,
      'equal': np.full(length, 1 / length),
      'unit': (place == length) * 1.0,
      'position': inverse[::-1] / inverse.sum(),
      'position_reversed': inverse / inverse.sum(),
  }[value]


def _advantages(
    tree: trees.Tree, ngram: int, value: str, gae_lambda: float, advantage: str
) -> np.ndarray:
  """[trajectories, DEPTH] by the shipped functions."""
  mask = jnp.ones((len(trees.trajectories()), trees.DEPTH), bool)
  macro = termination.macro_actions(termination.fixed(mask, ngram=ngram), mask)
  made = targets.macro_targets(
      jnp.asarray(trees.along(tree.values)),
      jnp.asarray(trees.along(tree.rewards, by_token=True)),
      macro,
      tiny.objective(
          gamma=1.0,
          gae_lambda=gae_lambda,
          critic_lambda=gae_lambda,
          discount='macro',
          pool_rewards='sum',
          pool_values=value,
          advantage=advantage,
          critic_target='macro',
      ),
  )
  return np.asarray(made.advantages_BT)


def _policy_gradient(
    tree: trees.Tree, state: trees.Prefix, token_values: np.ndarray
) -> np.ndarray:
  """sum_a pi(a) x(a) d log pi(a) / d logits."""
  pi = tree.policy[state]
  return pi * (token_values - pi @ token_values)


@pytest.mark.parametrize(
    'advantage', ['shared', pytest.param('own', marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('value', VALUES)
def test_the_expected_gradient_is_the_true_one_times_sigma_so_far(
    value: str, advantage: str
):
  tree = trees.make(0, rewards_at=range(trees.DEPTH - 1, trees.DEPTH))
  chance = trees.chances(tree)
  paths = np.array(trees.trajectories())
  seen = set()
  with jax.enable_x64(True):
    for ngram in (2, 4, 0):
      length = ngram or trees.DEPTH
      for gae_lambda in (0.0, 0.95, 1.0):
        made = _advantages(tree, ngram, value, gae_lambda, advantage)
        for state in trees.states():
          t, rows = len(state), trees.through(state)
          # Of each token: expected advantage given the state and the token.
          expected = np.array(
              [
                  (chance[at, t] @ made[at, t]) / tree.policy[state][token]
                  for token in range(trees.VOCAB)
                  for at in [rows[paths[rows, t] == token]]
              ]
          )
          first = t - t % length
          sigma = _weights(value, min(length, trees.DEPTH - first))
          credit = sigma[: t - first + 1].sum()
          np.testing.assert_allclose(
              _policy_gradient(tree, state, expected),
              credit * _policy_gradient(tree, state, tree.q(state)),
              rtol=0,
              atol=1e-9,
          )
          seen.add(round(credit, 6))
  assert seen == {
      'start': {1.0},
      'equal': {0.5, 1.0, 0.25, 0.75, 0.166667, 0.333333, 0.666667, 0.833333},
      'unit': {0.0, 1.0},
  }.get(value, seen)
  assert max(seen) == 1.0


def test_position_weights_of_three_tokens():
  # 2/11, 5/11, 1; reversed 6/11, 9/11, 1
  mask = jnp.ones((1, 3), bool)
  macro = termination.macro_actions(termination.fixed(mask, ngram=0), mask)
  sums = lambda name: np.cumsum(aggregate.sigma(macro, name, jnp.float32))
  np.testing.assert_allclose(sums('position'), [2 / 11, 5 / 11, 1], rtol=1e-6)
  np.testing.assert_allclose(
      sums('position_reversed'), [6 / 11, 9 / 11, 1], rtol=1e-6
  )


@pytest.mark.parametrize('ngram', [2, 3, 0])
def test_own_advantages_have_less_variance(ngram: int):
  """With `start` and token rewards the expectation is the same, too."""
  tree = trees.make(1)
  chance = trees.chances(tree)[:, :1]  # of the whole response
  with jax.enable_x64(True):
    shared, own = (
        _advantages(tree, ngram, 'start', 0.95, name)
        for name in ('shared', 'own')
    )
  variance = lambda x: np.sum(chance * x**2)
  assert variance(own) < 0.95 * variance(shared)
  paths = np.array(trees.trajectories())
  rest = trees.chances(tree)
  for state in trees.states():
    t, rows = len(state), trees.through(state)
    gap = [
        rest[at, t] @ (shared - own)[at, t] / tree.policy[state][token]
        for token in range(trees.VOCAB)
        for at in [rows[paths[rows, t] == token]]
    ]
    # The same for each token, so it moves no gradient.
    np.testing.assert_allclose(gap[0], gap[1], rtol=0, atol=1e-9)
