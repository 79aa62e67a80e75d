"""The objective holds what the config says, and every field counts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import targets
from ma_rlhf_jax.objective.advantage import Objective
from tests import tiny

# Field -> that of the config, and a value that is not the default.
_FIELDS: dict[str, tuple[str, Any]] = {
    'gamma': ('ppo.gamma', 0.8),
    'gae_lambda': ('ppo.gae_lambda', 0.5),
    'critic_lambda': ('critic.gae_lambda', 0.3),
    'discount': ('ppo.discount', 'token'),
    'pool_rewards': ('macro.reward', 'mean'),
    'pool_values': ('macro.value', 'equal'),
    'advantage': ('ppo.advantage', 'own'),
    'critic_target': ('critic.target', 'macro'),
    'baseline': ('ppo.baseline', 'rloo'),
    'samples_per_prompt': ('ppo.samples_per_prompt', 4),
    'whiten_advantages': ('ppo.whiten_advantages', True),
    'score_clip': ('ppo.score_clip', 1.5),
    'ratio': ('ppo.ratio', 'macro'),
    'loss_reduction': ('ppo.loss_reduction', 'constant'),
    'clip_eps': ('ppo.clip_eps', 0.01),
    'value_clip_eps': ('critic.clip_eps', 0.02),
}
PAPER = Objective.from_config(config_lib.base())


def test_every_field_is_in_the_table() -> None:
  names = [field.name for field in dataclasses.fields(Objective)]
  assert list(_FIELDS) == names
  assert len({path for path, _ in _FIELDS.values()}) == len(names)


@pytest.mark.parametrize('field', _FIELDS)
def test_a_field_is_read_from_its_place_in_the_config(field: str) -> None:
  path, value = _FIELDS[field]
  config = config_lib.base()
  config.update_from_flattened_dict({path: value})
  assert getattr(PAPER, field) != value
  changed = dataclasses.replace(PAPER, **{field: value})
  assert Objective.from_config(config) == changed


def test_it_cannot_be_written_to() -> None:
  with pytest.raises(dataclasses.FrozenInstanceError):
    PAPER.gamma = 0.5


def test_equal_objectives_share_a_compiled_program() -> None:
  traced = []

  def function(x: jax.Array, objective: Objective) -> jax.Array:
    traced.append(objective.gamma)
    return objective.gamma * x

  function = jax.jit(function, static_argnums=1)
  again = Objective.from_config(config_lib.base())
  assert again is not PAPER and hash(again) == hash(PAPER)
  other = dataclasses.replace(PAPER, gamma=0.5)
  found = [float(function(3.0, o)) for o in (PAPER, again, other)]
  assert found == [3, 3, 1.5] and traced == [1.0, 0.5]


@pytest.mark.parametrize(('own', 'want'), [(-1.0, 0.5), (0.0, 0.0), (0.3, 0.3)])
def test_the_critic_has_the_lambda_of_ppo_unless_it_has_its_own(
    own: float, want: float
) -> None:
  both = dataclasses.replace(PAPER, gae_lambda=0.5, critic_lambda=own)
  assert both.of_critic == dataclasses.replace(both, gae_lambda=want)


# Without discount all discounts are one; token returns take rewards undivided.
_TOKENS = {'gamma': 0.8}
_MACRO = {'critic_target': 'macro'}
_RLOO = {'baseline': 'rloo', 'samples_per_prompt': 2}


@pytest.mark.parametrize(
    ('base', 'field', 'changes'),
    [
        ({}, 'gamma', 'both'),
        ({'critic_lambda': 0.95}, 'gae_lambda', 'advantages'),
        ({}, 'gae_lambda', 'both'),
        ({}, 'critic_lambda', 'returns'),
        (_TOKENS, 'discount', 'both'),
        (_MACRO, 'pool_rewards', 'both'),
        ({}, 'pool_rewards', 'advantages'),
        ({}, 'pool_values', 'advantages'),
        ({}, 'advantage', 'advantages'),
        ({}, 'critic_target', 'returns'),
        ({'samples_per_prompt': 2}, 'baseline', 'both'),
        (_RLOO, 'samples_per_prompt', 'both'),
        ({}, 'whiten_advantages', 'advantages'),
    ],
    ids=lambda x: x if isinstance(x, str) else ','.join(x),
)
def test_a_field_of_the_estimation_changes_the_targets(
    base: dict[str, Any], field: str, changes: str
) -> None:
  """The rest of `_FIELDS` is in tests/ppo/wiring_test.py."""
  random = np.random.default_rng(0)
  mask = jnp.arange(8)[None] < jnp.array([8, 5, 7, 6])[:, None]
  macro = termination.macro_actions(termination.fixed(mask, ngram=3), mask)
  values, rewards = jnp.asarray(random.normal(size=(2, 4, 8)), jnp.float32)
  before = tiny.objective(**base)
  after = dataclasses.replace(before, **{field: _FIELDS[field][1]})
  one, two = (
      targets.estimate(values, rewards, macro, o) for o in (before, after)
  )
  differ = lambda name: not np.allclose(
      getattr(one, name), getattr(two, name), atol=1e-4
  )
  assert differ('advantages_BT') == (changes in ('advantages', 'both'))
  assert differ('returns_BT') == (changes in ('returns', 'both'))
