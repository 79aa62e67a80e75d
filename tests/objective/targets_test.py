"""What policy and critic aim at."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import aggregate, termination
from ma_rlhf_jax.objective import advantage, targets
from ma_rlhf_jax.structs import MacroActions, Targets
from tests import tiny

_jit_targets = jax.jit(targets.macro_targets, static_argnums=3)
_jit_gae = jax.jit(advantage.gae)
_jit_macro_actions = jax.jit(termination.macro_actions)
_jit_piecewise = jax.jit(advantage.piecewise)
DEFAULT = tiny.objective(
    gamma=1.0,
    gae_lambda=0.5,
    critic_lambda=-1.0,
    discount='macro',
    pool_rewards='sum',
    pool_values='start',
    advantage='shared',
    critic_target='token',
)

# Macro actions of 2 + 1 + 2 tokens and 3 tokens; row 2 has no token.
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0] * 6], bool)
STARTS = np.array([[1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6], bool)
VALUES = np.array([[1, 3, 2, 6, 4, 9], [2, 5, 7, 9, 9, 9], [9] * 6], 'float32')
REWARDS = np.array(
    [[0.5, 1, -1, 2, 4, 9], [1, -3, 5, 9, 9, 9], [9] * 6], 'float32'
)


def _macro(starts: np.ndarray = STARTS, mask: np.ndarray = MASK):
  return jax.device_get(_jit_macro_actions(starts, mask))


def macro_targets(*args: Any, **fields: Any) -> Targets:
  objective = dataclasses.replace(DEFAULT, **fields)
  return jax.device_get(_jit_targets(*args, objective))


def gae(*args, **kwargs) -> tuple[np.ndarray, np.ndarray]:
  return jax.device_get(_jit_gae(*args, **kwargs))


def _random(seed: int) -> tuple[np.ndarray, np.ndarray, MacroActions]:
  """float64 values and rewards, and macro actions of random lengths."""
  rng = np.random.default_rng(seed)
  mask = np.arange(12)[None] < rng.integers(0, 13, size=(6, 1))
  macro = _macro(rng.random((6, 12)) < 0.4, mask)
  values, rewards = rng.normal(size=(2, 6, 12))
  return values, rewards, macro


def test_macro_targets_by_hand():
  # Row 0, sums 1.5, -1, 6; values at the starts 1, 2, 6; lambda .5.
  # Deltas 1.5 + 2 - 1, -1 + 6 - 2, 6 - 6; advantages 2.5 + .5 * 3, 3, 0.
  # Row 1: sum 3 - value 2.
  got = macro_targets(
      VALUES,
      REWARDS,
      _macro(),
      critic_target='macro',
  )
  assert got.advantages_BT.tolist() == [
      [4, 4, 3, 0, 0, 0],
      [1, 1, 1, 0, 0, 0],
      [0, 0, 0, 0, 0, 0],
  ]
  # Plus the values 1, 2, 6; 2.
  assert got.returns_BT.tolist() == [
      [5, 5, 5, 6, 6, 0],
      [3, 3, 3, 0, 0, 0],
      [0, 0, 0, 0, 0, 0],
  ]


def test_mean_rewards_and_equal_values_by_hand():
  # Row 0: rewards .75, -1, 3; values 2, 2, 5; lambda .5.
  # Deltas .75 + 2 - 2, -1 + 5 - 2, 3 - 5; advantages -2, 2 - 1, .75 + .5.
  # Row 1: 1 - 14/3.
  got = macro_targets(
      VALUES,
      REWARDS,
      _macro(),
      pool_rewards='mean',
      pool_values='equal',
  )
  np.testing.assert_allclose(
      got.advantages_BT[:2, :5],
      [[1.25, 1.25, 1, -2, -2], [-11 / 3, -11 / 3, -11 / 3, 0, 0]],
      rtol=1e-6,
  )


def test_token_returns_by_hand():
  # Row 0, lambda 1 .5 .5 1 (last token: nothing follows). Deltas
  # .5 + 3 - 1, 1 + 2 - 3, -1 + 6 - 2, 2 + 4 - 6, 4 - 4 = 2.5, 0, 3, 0, 0.
  # Advantages from the end: 0, 0, 3, 0 + .5 * 3, 2.5 + 1.5; plus the values.
  # Row 1 is one macro action: rewards to go 3, 2, 5.
  got = macro_targets(VALUES, REWARDS, _macro())
  assert got.returns_BT.tolist() == [
      [5, 4.5, 5, 6, 4, 0],
      [3, 2, 5, 0, 0, 0],
      [0, 0, 0, 0, 0, 0],
  ]


def test_gamma_acts_at_the_ends_of_macro_actions():
  # Row 0, gamma .5, lambda 0: rewards to the end of the macro action plus .5
  # of the value after it: .5 + [1 + .5 * 2] (lambda is 1 inside), 1 + .5 * 2,
  # -1 + .5 * 6, 2 + 4, 4.
  got = macro_targets(
      VALUES,
      REWARDS,
      _macro(),
      gamma=0.5,
      gae_lambda=0.0,
  )
  assert got.returns_BT[0].tolist() == [2.5, 2, 2, 6, 4, 0]


def test_critic_sees_the_starts_only_where_asked():
  mask = lambda name: targets.critic_mask(MASK, STARTS, name)
  np.testing.assert_array_equal(mask('starts'), STARTS)
  np.testing.assert_array_equal(mask('macro'), MASK)
  np.testing.assert_array_equal(mask('token'), MASK)
  # The others need not know where macro actions start.
  for name in ('macro', 'token'):
    assert targets.critic_mask(MASK, None, name) is MASK


def test_lambda_one_does_not_see_the_macro_actions_at_their_starts():
  # Rewards to go minus the value, whatever the macro actions.
  got = macro_targets(
      VALUES,
      REWARDS,
      _macro(),
      gae_lambda=1.0,
  )
  # 6.5 - 1, 5 - 2, 6 - 6; 3 - 2
  assert got.advantages_BT[:2].tolist() == [
      [5.5, 5.5, 3, 0, 0, 0],
      [1, 1, 1, 0, 0, 0],
  ]
  # Rewards to go: 6.5 6 5 6 4; 3 2 5
  assert got.returns_BT[:2].tolist() == [
      [6.5, 6, 5, 6, 4, 0],
      [3, 2, 5, 0, 0, 0],
  ]


@pytest.mark.parametrize('critic_target', advantage.CRITIC_TARGETS)
def test_padding_row_order_and_jit_change_nothing(critic_target: str):
  settings = {'critic_target': critic_target}
  base = macro_targets(VALUES, REWARDS, _macro(), **settings)
  fill = lambda x: np.where(MASK, x, np.float32('nan'))
  nan = macro_targets(fill(VALUES), fill(REWARDS), _macro(), **settings)
  order = np.array([1, 2, 0])
  moved = macro_targets(
      VALUES[order],
      REWARDS[order],
      _macro(STARTS[order], MASK[order]),
      **settings,
  )
  plain = targets.macro_targets(
      VALUES, REWARDS, _macro(), dataclasses.replace(DEFAULT, **settings)
  )
  for name in ('advantages_BT', 'returns_BT'):
    want = getattr(base, name)
    np.testing.assert_array_equal(getattr(nan, name), want)
    np.testing.assert_array_equal(getattr(moved, name), want[order])
    np.testing.assert_allclose(getattr(plain, name), want, rtol=1e-6)


def test_gradient_is_zero_on_padding():
  def cost(values, rewards):
    made = targets.macro_targets(values, rewards, _macro(), DEFAULT)
    return jnp.sum(made.advantages_BT**2 + made.returns_BT**2)

  fill = lambda x: np.where(MASK, x, np.float32('nan'))
  grads = jax.jit(jax.grad(cost, argnums=(0, 1)))(fill(VALUES), fill(REWARDS))
  for grad in grads:
    assert np.isfinite(grad).all()
    assert not np.any(np.where(MASK, 0, grad))
    assert np.any(grad)


def test_leave_one_out_by_hand():
  # Others of 1 2 6: 4, 3.5, 1.5; of 5 5 2: 3.5, 3.5, 5.
  returns = jnp.array([1.0, 2, 6, 5, 5, 2])
  got = targets.leave_one_out(returns, samples=3)
  assert got.tolist() == [4, 3.5, 1.5, 3.5, 3.5, 5]
  for samples in (1, 4):
    with pytest.raises(ValueError, match=f'samples={samples} must be at least'):
      targets.leave_one_out(returns, samples=samples)


def test_the_critic_may_have_a_lambda_of_its_own():
  plain = macro_targets(VALUES, REWARDS, _macro())
  other = macro_targets(VALUES, REWARDS, _macro(), critic_lambda=1.0)
  np.testing.assert_array_equal(other.advantages_BT, plain.advantages_BT)
  # Rewards to go: 6.5 6 5 6 4
  assert other.returns_BT[0].tolist() == [6.5, 6, 5, 6, 4, 0]


def test_discount_per_token_by_hand():
  # Row 0, gamma .5, lambda 1: discounted rewards to go of macro actions
  #   m2: 2 + .5 * 4 = 4;  m1: -1 + .5 * 4 = 1;  m0: .5 + .5 * 1 + .25 * 1
  # less the values 6, 2, 1.
  got = macro_targets(
      VALUES,
      REWARDS,
      _macro(),
      gamma=0.5,
      gae_lambda=1.0,
      discount='token',
      critic_target='macro',
  )
  assert got.advantages_BT[0].tolist() == [0.25, 0.25, -1, -2, -2, 0]
  assert got.returns_BT[0].tolist() == [1.25, 1.25, 1, 4, 4, 0]


@pytest.mark.parametrize(
    'value', ['start', 'equal', 'unit', 'position', 'position_reversed']
)
@pytest.mark.parametrize('reward', ['sum', 'mean'])
def test_own_advantages_are_the_shared_ones_less_what_is_known(
    value: str, reward: str
):
  values, rewards, macro = _random(5)
  with jax.enable_x64(True):
    how = {'pool_values': value, 'pool_rewards': reward}
    how |= {'critic_target': 'macro'}
    shared, own = (
        macro_targets(values, rewards, macro, advantage=name, **how)
        for name in ('shared', 'own')
    )
    sigma, rho = (
        np.asarray(aggregate.sigma(macro, name, jnp.float64))
        for name in (value, reward)
    )
  for row, t in zip(*np.nonzero(macro.mask_BT), strict=True):
    first = np.nonzero(macro.starts_BT[row, : t + 1])[0][-1]
    before, known = slice(first, t), slice(first, t + 1)
    want = (
        shared.advantages_BT[row, t]
        - (rho * rewards)[row, before].sum()
        + (sigma * values)[row, known].sum()
        - sigma[row, known].sum() * values[row, t]
    )
    assert abs(own.advantages_BT[row, t] - want) < 1e-12


def test_an_estimator_of_the_user_gives_the_advantages(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  (tmp_path / 'my_advantages.py').write_text(
      'def surprise(values_BT, rewards_BT, macro, objective):\n'
      '  return rewards_BT - objective.gamma * values_BT\n'
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  got = macro_targets(
      VALUES, REWARDS, _macro(), advantage='my_advantages:surprise'
  )
  want = np.where(MASK, REWARDS - VALUES, 0)
  np.testing.assert_array_equal(got.advantages_BT, want)
  plain = macro_targets(VALUES, REWARDS, _macro())
  np.testing.assert_array_equal(got.returns_BT, plain.returns_BT)


def test_without_a_critic_others_of_the_prompt_are_the_baseline():
  # Rewards to go of whole responses, gamma 1: 6.5 3 | 0 4. The value of each
  # token is that of the other one, so 6.5 5 6 less 3; 3 less 6.5; 0 less 4.
  mask = np.vstack([MASK, MASK[1:2]])
  starts, rewards = np.vstack([STARTS, STARTS[1:2]]), np.vstack([REWARDS] * 2)
  rewards = rewards[:4].copy()
  rewards[3, :3] = 1, 1, 2
  objective = dataclasses.replace(
      DEFAULT, gae_lambda=1.0, baseline='rloo', samples_per_prompt=2
  )
  nothing = np.full(rewards.shape, np.nan, 'float32')
  got = targets.estimate(nothing, rewards, _macro(starts, mask), objective)
  assert got.advantages_BT.tolist() == [
      [3.5, 3.5, 2, 3, 3, 0],
      [-3.5, -3.5, -3.5, 0, 0, 0],
      [0, 0, 0, 0, 0, 0],
      [4, 4, 4, 0, 0, 0],
  ]
