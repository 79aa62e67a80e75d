"""What is not finite, or beyond any sound model, is named."""

import math

import jax
import jax.numpy as jnp
import pytest

from ma_rlhf_jax.structs import TrainState
from ma_rlhf_jax.training import health


def _states() -> dict:
  params = {'w': jnp.arange(6.0).reshape(2, 3), 'b': jnp.ones(2, jnp.bfloat16)}
  moments = {'mu': jnp.full((2, 3), 1e9), 'count': jnp.int32(3)}
  return {
      'policy': TrainState(jnp.int32(7), params, moments),
      'kl_coef': jnp.float32(1e6),
  }


def test_moments_and_scalars_may_be_large_and_sound_weights_pass() -> None:
  assert health.problem(_states()) == ''


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_named(bad: float) -> None:
  for part, name in (('params', 'w'), ('opt_state', 'mu')):
    states = _states()
    leaves = getattr(states['policy'], part)
    leaves = leaves | {name: leaves[name].at[1, 2].set(bad)}
    states['policy'] = states['policy'].replace(**{part: leaves})
    assert health.problem(states) == f'policy/{part}/{name} is nan or infinite'
  states = _states() | {'kl_coef': jnp.float32(bad)}
  assert health.problem(states) == 'kl_coef is nan or infinite'


def test_weights_beyond_the_bound_are_ruined() -> None:
  states = _states()
  w = states['policy'].params['w']
  for value, found in ((9999.0, False), (-9999.0, False), (-8.7e11, True)):
    params = states['policy'].params | {'w': w.at[1, 0].set(value)}
    states['policy'] = states['policy'].replace(params=params)
    assert bool(health.problem(states)) == found
  assert 'policy/params/w is ruined: the largest weight is 8.7e+11' in (
      health.problem(states)
  )


def test_a_nan_of_one_shard_is_seen_by_all() -> None:
  mesh = jax.make_mesh((len(jax.devices()),), ('data',))
  rows = jax.NamedSharding(mesh, jax.P('data'))
  x = jnp.ones((2 * len(jax.devices()), 3)).at[-1, 2].set(jnp.nan)
  states = {'critic': TrainState(0, {'h': jax.device_put(x, rows)}, ())}
  states['critic'] = states['critic'].replace(step=jnp.int32(1))
  assert health.problem(states) == 'critic/params/h is nan or infinite'


def test_the_error_says_what_and_what_to_do() -> None:
  error = health.RuinedError('ppo', 3, 'critic/params/h is nan', 'step 2 in /d')
  assert error.what == 'ppo step 3: critic/params/h is nan'
  assert str(error).startswith(error.what)
  assert 'step 2 in /d' in str(error) and 'smaller optim.lr' in str(error)
