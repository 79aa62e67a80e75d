"""GAE over steps, and lambdas and discounts for single tokens."""

import math

import jax
import numpy as np

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import advantage
from tests import tiny
from tests.oracle import cases, tensor

_jit_gae = jax.jit(advantage.gae)
_jit_macro_actions = jax.jit(termination.macro_actions)
_jit_piecewise = jax.jit(advantage.piecewise)

# Macro actions of 2 + 1 + 2 tokens and 3 tokens; row 2 has no token.
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0] * 6], bool)
STARTS = np.array([[1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6], bool)


def gae(*args, **kwargs) -> tuple[np.ndarray, np.ndarray]:
  return jax.device_get(_jit_gae(*args, **kwargs))


def test_gae_by_hand():
  # gamma .5, lambda .5; delta 2 = 4 - 2; delta 1 = 1 + .5 * 2 - 6 = -4;
  # delta 0 = 3 + .5 * 6 - 4 = 2; advantages 2; -4 + .25 * 2; 2 + .25 * -3.5
  values = np.array([[4.0, 6, 2, math.nan]])
  rewards = np.array([[3.0, 1, 4, math.nan]])
  mask = np.array([[True, True, True, False]])
  got, returns = gae(values, rewards, mask, gamma=0.5, gae_lambda=0.5)
  np.testing.assert_allclose(got, [[1.125, -3.5, 2, 0]])
  np.testing.assert_allclose(returns, [[5.125, 2.5, 4, 0]])


def test_gae_takes_a_lambda_for_each_step():
  # gamma 1; deltas 3 + 6 - 4, 1 + 2 - 6, 4 - 2; lambda_0 = 1, lambda_1 = .25:
  # 2; -3 + .25 * 2; 5 + 1 * -2.5
  values = np.array([[4.0, 6, 2]])
  rewards = np.array([[3.0, 1, 4]])
  trace = np.array([[1.0, 0.25, 7.0]])  # nothing follows the last step
  mask = np.array([[True, True, True]])
  got, _ = gae(values, rewards, mask, gamma=1.0, gae_lambda=trace)
  np.testing.assert_allclose(got, [[2.5, -2.5, 2]])


def test_oracle_gae():
  with jax.enable_x64(True):
    for case in cases('gae.json'):
      values, rewards = tensor(case['values']), tensor(case['rewards'])
      values, rewards = (x[:, case['start'] :] for x in (values, rewards))
      got = gae(
          values,
          rewards,
          np.ones(values.shape, bool),
          gamma=case['gamma'],
          gae_lambda=case['lam'],
      )
      for ours, name in zip(got, ('advantages', 'returns'), strict=True):
        np.testing.assert_allclose(
            ours, tensor(case[name]), rtol=1e-10, atol=1e-12
        )


def test_piecewise_is_one_inside_and_lambda_at_ends():
  got = _jit_piecewise(_jit_macro_actions(STARTS, MASK), 0.25)
  assert got[:2, :5].tolist() == [[1, 0.25, 0.25, 1, 0.25], [1, 1, 0.25, 1, 1]]


def test_rewards_to_go_by_hand():
  # Macro actions of 2 + 1 + 2 tokens and of 3.
  rewards = np.where(
      MASK, [[1.0, 2, 4, 3, 5, 0], [6, 2, 4, 0, 0, 0]] + [[0] * 6], math.nan
  )
  macro = _jit_macro_actions(STARTS, MASK)
  found = lambda **how: jax.device_get(
      advantage.rewards_to_go(rewards, macro, tiny.objective(gamma=0.5, **how))
  )
  # Sums 3 4 8 and 12: 3 + .5 * (4 + .5 * 8), 4 + .5 * 8
  np.testing.assert_allclose(
      found(discount='macro', pool_rewards='sum')[:, :3],
      [[7, 8, 8], [12, 0, 0], [0, 0, 0]],
  )
  # Means 1.5 4 4 and 4.
  np.testing.assert_allclose(
      found(discount='macro', pool_rewards='mean')[:, :3],
      [[4.5, 6, 4], [4, 0, 0], [0, 0, 0]],
  )
  # Each token: 1 + 2/2 + 4/4 + 3/8 + 5/16, 4 + 3/2 + 5/4, 3 + 5/2; 6 + 1 + 1
  np.testing.assert_allclose(
      found(discount='token', pool_rewards='sum')[:, :3],
      [[3.6875, 6.75, 5.5], [8, 0, 0], [0, 0, 0]],
  )
