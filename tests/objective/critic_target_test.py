"""What a tabular critic learns from each target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import targets
from tests import tiny
from tests.objective import trees


def _learned(
    tree: trees.Tree, ngram: int, gae_lambda: float, target: str
) -> dict[trees.Prefix, float]:
  """The fixed point of V <- E[target | state], over all trajectories."""
  mask = jnp.ones((len(trees.trajectories()), trees.DEPTH), bool)
  macro = termination.macro_actions(termination.fixed(mask, ngram=ngram), mask)
  seen = np.asarray(targets.critic_mask(mask, macro.starts_BT, target))[0]
  rewards = jnp.asarray(trees.along(tree.rewards, by_token=True))
  run = jax.jit(
      lambda values: targets.macro_targets(
          values,
          rewards,
          macro,
          tiny.objective(
              gamma=1.0,
              gae_lambda=gae_lambda,
              critic_lambda=gae_lambda,
              discount='macro',
              pool_rewards='sum',
              pool_values='start',
              advantage='shared',
              critic_target=target,
          ),
      ).returns_BT
  )
  chance = trees.chances(tree)
  learned = [s for s in trees.states() if seen[len(s)]]
  values = dict.fromkeys(trees.states(), 0.3)
  for _ in range(trees.DEPTH + 1):  # exact after one sweep a depth
    made = np.asarray(run(jnp.asarray(trees.along(values))))
    for state in learned:
      rows, t = trees.through(state), len(state)
      values[state] = float(chance[rows, t] @ made[rows, t])
  return {state: values[state] for state in learned}


@pytest.mark.parametrize('gae_lambda', [0.0, 0.95, 1.0])
@pytest.mark.parametrize('ngram', [1, 2, 4, 0])
def test_targets_of_the_critic(ngram: int, gae_lambda: float):
  """`token` and `starts` learn V; `macro` adds what was already paid."""
  tree = trees.make(2)
  length = ngram or trees.DEPTH
  with jax.enable_x64(True):
    token, starts, macro = (
        _learned(tree, ngram, gae_lambda, target)
        for target in ('token', 'starts', 'macro')
    )
  assert len(token) == len(macro) == 63 and len(starts) <= 63
  for state, value in token.items():
    assert abs(value - tree.values[state]) < 1e-9
  for state, value in starts.items():
    assert len(state) % length == 0
    assert abs(value - tree.values[state]) < 1e-9
  for state, value in macro.items():
    first = len(state) - len(state) % length
    paid = sum(
        tree.rewards[state[:t]][state[t]] for t in range(first, len(state))
    )
    assert abs(value - tree.values[state] - paid) < 1e-9
