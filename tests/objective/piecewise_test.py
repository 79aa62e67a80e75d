"""Macro GAE is token GAE whose lambda is 1 inside macro actions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import targets
from ma_rlhf_jax.structs import MacroActions, Targets
from tests import tiny

_macro_actions = jax.jit(termination.macro_actions)
_fixed = jax.jit(termination.fixed, static_argnames='ngram')


@functools.partial(jax.jit, static_argnames=('discount', 'advantage', 'target'))
def _targets(
    values: jax.Array,
    rewards: jax.Array,
    macro: MacroActions,
    gamma: float,
    gae_lambda: float,
    *,
    discount: str,
    advantage: str,
    target: str = 'token',
) -> Targets:
  return targets.macro_targets(
      values,
      rewards,
      macro,
      tiny.objective(
          gamma=gamma,
          gae_lambda=gae_lambda,
          critic_lambda=-1.0,
          discount=discount,
          pool_rewards='sum',
          pool_values='start',
          advantage=advantage,
          critic_target=target,
      ),
  )


def _plain(
    values: np.ndarray,
    rewards: np.ndarray,
    starts: np.ndarray,
    gamma: float,
    gae_lambda: float,
    discount: str,
) -> tuple[list[float], list[float], list[float]]:
  """Of one row: own advantages, TD errors, and discounts within macros."""
  length = len(values)
  ends = [t + 1 == length or bool(starts[t + 1]) for t in range(length)]
  step = [gamma if discount == 'token' or end else 1.0 for end in ends]
  after = [*values[1:], 0.0]
  deltas = [rewards[t] + step[t] * after[t] - values[t] for t in range(length)]
  own, later = [0.0] * length, 0.0
  for t in reversed(range(length)):
    later = deltas[t] + step[t] * (gae_lambda if ends[t] else 1.0) * later
    own[t] = later
  return own, deltas, step


@pytest.mark.parametrize('discount', ['macro', 'token'])
@pytest.mark.parametrize('gamma', [1.0, 0.9])
def test_macro_gae_is_piecewise_lambda_token_gae(gamma: float, discount: str):
  cases = itertools.product(range(3), (0.0, 0.95, 1.0), (None, 1, 3, 0))
  with jax.enable_x64(True):
    for seed, gae_lambda, ngram in cases:
      rng = np.random.default_rng(seed)
      mask = np.arange(14)[None] < rng.integers(0, 15, size=(1 + 2 * seed, 1))
      starts = jnp.asarray(rng.random(mask.shape) < 0.35)
      if ngram is not None:
        starts = _fixed(jnp.asarray(mask), ngram=ngram)
      macro = jax.device_get(_macro_actions(starts, jnp.asarray(mask)))
      values, rewards = rng.normal(size=(2, *mask.shape))
      how = values, rewards, macro, gamma, gae_lambda
      shared, own = (
          _targets(*how, discount=discount, advantage=name)
          for name in ('shared', 'own')
      )
      for row in range(len(mask)):
        n = int(mask[row].sum())
        x = (y[row, :n] for y in (values, rewards, macro.starts_BT))
        want, deltas, step = _plain(*x, gamma, gae_lambda, discount)
        close = functools.partial(
            np.testing.assert_allclose, rtol=0, atol=1e-12
        )
        close(own.advantages_BT[row, :n], want)
        close(own.returns_BT[row, :n], np.add(want, values[row, :n]))
        # A later token's shared advantage also has the TD errors before it.
        earlier, weight = 0.0, 1.0
        for t in range(n):
          if macro.starts_BT[row, t]:
            earlier, weight = 0.0, 1.0
          close(shared.advantages_BT[row, t], earlier + weight * want[t])
          earlier += weight * deltas[t]
          weight *= step[t]


def test_all_critic_targets_agree_at_the_starts():
  rng = np.random.default_rng(7)
  mask = np.arange(12)[None] < rng.integers(1, 13, size=(5, 1))
  macro = _macro_actions(jnp.asarray(rng.random(mask.shape) < 0.4), mask)
  values, rewards = rng.normal(size=(2, *mask.shape))
  with jax.enable_x64(True):
    for discount in ('macro', 'token'):
      token, macro_action = (
          np.asarray(
              _targets(
                  values,
                  rewards,
                  macro,
                  0.9,
                  0.8,
                  discount=discount,
                  advantage='shared',
                  target=target,
              ).returns_BT
          )[np.asarray(macro.starts_BT)]
          for target in ('token', 'macro')
      )
      np.testing.assert_allclose(token, macro_action, rtol=0, atol=1e-12)
