"""One pass takes the step that scoring first and learning then takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.ppo import programs, stage
from ma_rlhf_jax.structs import Models
from tests import tiny

# Steps of one size would hide a scaled gradient, and blow up tiny ones.
_MOMENTUM = {
    f'{name}__optim__{field}': value
    for name in ('ppo', 'critic')
    for field, value in (('eps', 1e-2), ('lr', 1e-2), ('clip_norm', 0.0))
}


def _stage(tmp: Any, **fields: Any) -> stage.PPO:
  config = tiny.config(**{'ppo__batch_size': 8} | _MOMENTUM | fields)
  params = Models(
      policy=tiny.params('policy', 0),
      ref_policy=tiny.params('policy', 2),
      critic=tiny.params('scalar', 1),
      reward_model=tiny.params('scalar', 3),
  )
  params = jax.tree.map(jnp.array, params)  # steps donate
  run = tiny.run(tmp, config, mesh=tiny.mesh(1, 1, 1))
  return stage.PPO(run, Models(*[tiny.SHAPE] * 4), params)


def _step(tmp: Any, **fields: Any) -> tuple[set[str], dict, dict]:
  """Which models learned in one pass, the states after it, and metrics."""
  stage = _stage(tmp, **fields)
  with jax.set_mesh(stage.run.mesh):
    states, metrics = stage.step(stage.states, 0)
  return set(stage.programs.fused_models), *jax.device_get((states, metrics))


# Clauses of `why_not_fused` that hold, with settings that reach every branch.
_EXACT = {
    'fixed': {'macro__ngram': 3},
    'by probability': {'macro__termination': 'ppl', 'macro__value': 'equal'},
    'by the old policy': {
        'macro__termination': 'low_probability',
        'macro__cut_count': 2,
        'macro__logprobs': 'old',
    },
    'macro actions counted before': {
        'macro__ngram': 3,
        'ppo__loss_reduction': 'macro',
        'critic__target': 'starts',
    },
    'macro ratio, per token': {
        'macro__ngram': 3,
        'ppo__ratio': 'macro',
        'ppo__loss_reduction': 'token',
        'ppo__advantage': 'own',
    },
    'micro-batches of several widths': {
        'macro__ngram': 3,
        'ppo__length_buckets': 3,
        'ppo__micro_batch_size': 2,
    },
}


@pytest.mark.parametrize(
    ('name', 'how'),
    [('fixed', 'joint')]
    + [
        pytest.param(name, how, marks=pytest.mark.slow)
        for name in _EXACT
        for how in ('joint', 'policy')
        if (name, how) != ('fixed', 'joint')
    ],
)
def test_one_pass_takes_the_step_of_two(
    tmp_path: Any, name: str, how: str
) -> None:
  together, states, metrics = _step(tmp_path, ppo__one_pass=how, **_EXACT[name])
  learned = {'joint': {'policy', 'critic'}, 'policy': {'policy'}}
  assert together == learned[how]
  apart, want_states, want = _step(
      tmp_path, ppo__one_pass='off', **_EXACT[name]
  )
  assert not apart and metrics.keys() == want.keys()
  for key, value in want.items():
    np.testing.assert_allclose(
        metrics[key], value, rtol=2e-4, atol=2e-5, err_msg=key
    )
  before = {
      'policy': tiny.params('policy', 0),
      'critic': tiny.params('scalar', 1),
  }
  for model, start in before.items():
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
        states[model].params,
        want_states[model].params,
    )
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), states[model].params, start
    )
    assert max(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize(
    'fields',
    [
        {'ppo__ppo_epochs': 2},
        {'ppo__minibatches': 2},
        {'ppo__whiten_advantages': True},
        {
            'ppo__baseline': 'rloo',
            'ppo__samples_per_prompt': 2,
            'ppo__gae_lambda': 1.0,
        },
        {'macro__termination': 'ppl', 'ppo__loss_reduction': 'macro'},
        {'macro__termination': 'ppl', 'critic__target': 'starts'},
        {'ppo__one_pass': 'off'},
    ],
    ids=lambda x: ', '.join(x),
)
def test_where_it_is_not_exact_two_passes_are_taken(
    fields: dict[str, Any],
) -> None:
  names = [name.replace('__', '.') for name in fields]
  reason = programs.why_not_fused(tiny.config(**fields))
  assert any(name in reason for name in names), reason
  assert not programs.why_not_fused(tiny.config())


@pytest.mark.slow
def test_whitened_by_micro_batches_the_step_would_be_another(
    tmp_path: Any, monkeypatch: Any
) -> None:
  fields = {'ppo__whiten_advantages': True, 'ppo__micro_batch_size': 2}
  _, want, _ = _step(tmp_path, **fields)
  monkeypatch.setattr(programs, 'why_not_fused', lambda _: '')
  _, found, _ = _step(tmp_path, **fields)
  apart = jax.tree.map(
      lambda a, b: np.abs(a - b).max(),
      [found[name].params for name in ('policy', 'critic')],
      [want[name].params for name in ('policy', 'critic')],
  )
  assert max(jax.tree.leaves(apart)) > 1e-5


@pytest.mark.parametrize(
    'fields',
    [{'ppo__loss_reduction': 'macro'}, {'critic__target': 'starts'}],
    ids=lambda x: ', '.join(x),
)
def test_macro_actions_that_come_with_the_scores_cannot_be_counted_before(
    tmp_path: Any, monkeypatch: Any, fields: dict[str, Any]
) -> None:
  monkeypatch.setattr(programs, 'why_not_fused', lambda _: '')
  with pytest.raises((TypeError, AssertionError)):
    _step(tmp_path, macro__termination='ppl', **fields)


@pytest.mark.slow
def test_the_critic_alone_learns_in_its_warm_up(tmp_path: Any) -> None:
  stage = _stage(
      tmp_path, ppo__critic_warmup_updates=1, ppo__steps=4, macro__ngram=3
  )
  before = jax.device_get(stage.states['policy'].params)
  critic = jax.device_get(stage.states['critic'].params)
  with jax.set_mesh(stage.run.mesh):
    states, metrics = stage.step(stage.states, 0)
  jax.tree.map(np.testing.assert_array_equal, states['policy'].params, before)
  assert np.abs(states['critic'].params['head'] - critic['head']).max() > 0
  assert 'loss/critic' in metrics and 'loss/policy' not in metrics
