"""Each switch of the config changes the step where it says that it does.

What is expected is made by the functions themselves, called with explicit
values; the config changes one field at a time, and the result must change too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.macro.termination import TerminationInputs, TerminationSettings
from ma_rlhf_jax.objective import losses, rewards, targets
from ma_rlhf_jax.ppo import metrics, step
from ma_rlhf_jax.ppo.host import HostAnswers
from ma_rlhf_jax.ppo.programs import Programs
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    MacroActions,
    Models,
    Rollout,
    Scored,
)
from ma_rlhf_jax.training import optim, update
from tests import tiny
from tests.ppo import given

B, T = 4, tiny.RESPONSE_LEN
ROWS = tiny.sequences([0, 1, 2, 7])
MASK = ROWS.response_mask_BT
KEYS = jax.random.split(jax.random.key(2), B)


def _random(seed: int, scale: float = 1.0) -> Array:
  drawn = scale * np.random.default_rng(seed).normal(size=(B, T))
  return jnp.where(MASK, jnp.asarray(drawn, jnp.float32), 0)


# Log-probs around the cut of .9, in another order for each model.
OLD = jnp.where(MASK, -jnp.abs(_random(0, 0.3)), 0)
REF = jnp.where(MASK, -jnp.abs(_random(1, 0.3)), 0)
SCORED = Scored(
    logprobs_BT=OLD,
    ref_logprobs_BT=REF,
    entropy_BT=_random(2),
    values_BT=_random(3),
    score_B=jnp.array([0.7, -1.2, 4.0, 0.4]),
)
ROLLOUT = Rollout(ROWS, _random(4), jnp.ones((B, T)))


def _experience(kl_coef: float = 0.05, **fields: Any) -> Experience:
  fields = {name.replace('.', '__'): value for name, value in fields.items()}
  made, _ = step.form_experience(
      ROWS,
      SCORED,
      KEYS,
      jnp.float32(kl_coef),
      HostAnswers(),
      given.method(**fields),
  )
  return made


def _differ(one: Any, other: Any) -> bool:
  leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return any(not np.allclose(a, b, atol=1e-5) for a, b in leaves)


def _same(one: Any, other: Any) -> None:
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      one,
      other,
  )


_RANDOM = {'termination': 'randomised', 'random_lengths': (1, 3)}
_CUTS = {'termination': 'low_probability', 'cut_count': 2}
_LAST = {'last_token_alone': True, 'ngram': 2}


@pytest.mark.parametrize(
    ('base', 'field', 'value'),
    [
        ({}, 'termination', 'ppl'),
        ({}, 'ngram', 3),
        (_RANDOM, 'random_lengths', (2, 5)),
        (_RANDOM | {'random_repeats': 1}, 'random_repeats', 2),
        (_RANDOM | {'random_repeats': 1}, 'random_leftover', 'cycle'),
        (_CUTS, 'cut_probability', 0.7),
        (_CUTS, 'cut_count', 3),
        ({'ngram': 1}, 'min_len', 2),
        ({'ngram': 0}, 'max_len', 3),
        ({'ngram': 4}, 'last_token_alone', True),
        (_LAST, 'empty_step', True),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else '',
)
def test_a_field_of_the_rules_changes_the_macro_actions(
    base: dict[str, Any], field: str, value: Any
) -> None:
  def segmented(settings: dict[str, Any]) -> MacroActions:
    inputs = TerminationInputs(mask_BT=MASK, logprobs_BT=REF, keys_B=KEYS)
    settings = {'termination': 'fixed', 'ngram': 5, **settings}
    return termination.segment(inputs, TerminationSettings(**settings))

  changed = base | {field: value}
  # The empty step needs the shared target.
  fields = {f'macro.{name}': x for name, x in changed.items()}
  found = _experience(**{'critic.target': 'macro'}, **fields).macro
  _same(found, segmented(changed))
  before = segmented(base)
  if field == 'empty_step':
    before = before.replace(empty_B=jnp.full(B, T))
  assert _differ(found, before)


@pytest.mark.parametrize('model', ['ref', 'old'])
def test_perplexities_are_those_of_the_named_model(model: str) -> None:
  found = _experience(
      **{'macro.termination': 'ppl_adjacent', 'macro.logprobs': model}
  )
  starts = {m: termination.ppl_adjacent(x, MASK) for m, x in _MODELS.items()}
  _same(found.macro.starts_BT, starts[model])
  assert _differ(starts['ref'], starts['old'])


_MODELS = {'ref': REF, 'old': OLD}


@pytest.mark.parametrize(
    'fields',
    [
        {},
        {'ppo.gamma': 0.8, 'ppo.discount': 'token'},
        {'ppo.gae_lambda': 0.5, 'critic.gae_lambda': 0.3},
        {'critic.target': 'macro', 'macro.reward': 'mean'},
        {'macro.value': 'equal', 'ppo.advantage': 'own'},
    ],
    ids=str,
)
def test_targets_are_estimated_from_token_rewards(
    fields: dict[str, Any],
) -> None:
  """That each field changes them is in tests/objective/objective_test.py."""
  found = _experience(**fields, **{'macro.ngram': 3})
  rewards_BT = rewards.token_rewards(
      OLD, REF, SCORED.score_B, MASK, kl_coef=0.05, score_clip=2.5
  )
  names = {name.replace('.', '__'): value for name, value in fields.items()}
  want = targets.macro_targets(
      SCORED.values_BT,
      rewards_BT,
      found.macro,
      given.method(**names).objective,
  )
  _same(found.targets, want)


def test_the_score_is_clipped_as_the_config_says() -> None:
  # Of scores .7 -1.2 4 .4.
  made = [_experience(**{'ppo.score_clip': x}) for x in (0.0, 2.5, 0.5)]
  for one, other in zip(made, made[1:], strict=False):
    assert _differ(one.targets, other.targets)
  _same(made[0].targets, _experience(**{'ppo.score_clip': 5.0}).targets)


def test_the_coefficient_that_was_adapted_weighs_the_rewards() -> None:
  objective = tiny.objective()
  found, rewards_BT = step.form_experience(
      ROWS, SCORED, KEYS, jnp.float32(0.4), HostAnswers(), given.method()
  )
  want_BT = rewards.token_rewards(
      OLD, REF, SCORED.score_B, MASK, kl_coef=0.4, score_clip=2.5
  )
  _same(rewards_BT, want_BT)
  want = targets.macro_targets(
      SCORED.values_BT, want_BT, found.macro, objective
  )
  _same(found.targets, want)
  told = metrics.describe(
      ROLLOUT, found, rewards_BT, jnp.float32(0.4), objective
  )
  assert told['objective/kl_coef'] == np.float32(0.4)


def test_the_critic_has_the_lambda_of_ppo_unless_it_has_its_own() -> None:
  one = _experience(**{'ppo.gae_lambda': 0.4, 'macro.ngram': 3})
  both = {'ppo.gae_lambda': 0.4, 'critic.gae_lambda': 0.4, 'macro.ngram': 3}
  _same(one.targets, _experience(**both).targets)


@pytest.mark.parametrize('reward', ['sum', 'mean'])
def test_other_responses_are_the_baseline_without_a_critic(reward: str) -> None:
  found = _experience(
      **{
          'ppo.baseline': 'rloo',
          'ppo.samples_per_prompt': 2,
          'ppo.gae_lambda': 1.0,
          'macro.reward': reward,
          'macro.ngram': 3,
      }
  )
  rewards_BT = np.asarray(
      rewards.token_rewards(
          OLD, REF, SCORED.score_B, MASK, kl_coef=0.05, score_clip=2.5
      )
  )
  ids, want = np.asarray(found.macro.ids_BT), np.zeros((B, T))
  earned = []
  for row in range(B):
    macros = [rewards_BT[row, ids[row] == m] for m in range(T)]
    pooled = [getattr(np, reward)(m) for m in macros if len(m)]
    earned.append(np.cumsum(pooled[::-1])[::-1])  # from each macro action on
  for row in range(B):
    other = earned[row ^ 1][0]  # rows 0 and 1 share a prompt, so do 2 and 3
    for t in np.flatnonzero(MASK[row]):
      want[row, t] = earned[row][ids[row, t]] - other
  np.testing.assert_allclose(found.targets.advantages_BT, want, atol=1e-5)


# Whole updates: one step of each model on an experience whose ratios are not 1.

POLICY, CRITIC = tiny.params('policy', 0), tiny.params('scalar', 1)


def _programs(**fields: Any) -> tuple[Programs, step.States]:
  copy = lambda params: jax.tree.map(jnp.array, params)
  params = Models(copy(POLICY), POLICY, copy(CRITIC), CRITIC)
  spec = tiny.spec(tiny.config(**fields))
  programs = Programs(spec, Models(*[tiny.SHAPE] * 4), params, 3)
  return programs, programs.init_states(params)


def _by_programs(name: str, **fields: Any) -> Any:
  programs, states = _programs(**fields)
  return programs.update(name, states, _EXPERIENCE, 0)[0].params


_NOW, _ = scoring.response_logprobs(tiny.SHAPE, POLICY, ROWS, temperature=1.0)
_EXPERIENCE = _experience(**{'macro.ngram': 3})
# Ratios from .8 to 1.2 or so.
_EXPERIENCE = _EXPERIENCE.replace(
    scored=SCORED.replace(logprobs_BT=_NOW + _random(5, 0.1))
)


def _updated(model: str, loss_fn: Any, mask_BT: Array, reduction: str) -> Any:
  """What one update makes of a model, all values explicit."""
  name = {'policy': 'ppo', 'critic': 'critic'}[model]
  config = tiny.config(**_MOMENTUM[name])
  optimizer = optim.make_optimizer(config[name].optim, 3)
  params = {'policy': POLICY, 'critic': CRITIC}[model]
  weights = losses.loss_weights(
      mask_BT, _EXPERIENCE.macro.starts_BT, reduction=reduction
  )
  state, _ = update.train_step(
      update.init_state(params, optimizer),
      (_EXPERIENCE, weights),
      loss_fn=loss_fn,
      optimizer=optimizer,
      num_micro=1,
  )
  return state.params


def _assert_changed_alike(
    found: Any, want: Any, before: Any, base: Any
) -> None:
  """Both moved alike from `before`, and otherwise than with `base`."""
  minus = functools.partial(jax.tree.map, jnp.subtract)
  change = lambda after: jax.tree.leaves(minus(after, before))
  apart = lambda one, other: max(
      np.abs(a - b).max() for a, b in zip(one, other, strict=True)
  )
  found, want, base = map(change, (found, want, base))
  # Sums over 56 tokens of what was rounded a dozen times err by
  # sqrt(56 * 12) * 6e-8 = 1.5e-6 of their terms, of which some cancel.
  bound = 1e-4 * max(np.abs(x).max() for x in want)
  assert apart(found, want) < bound < 1e-2 * apart(base, want)


# With plain momentum a scaled loss shows; Adam's steps are of one size. Steps
# of size 1 are large against the rounding of what they are added to.
_OPTIM = {'eps': 1.0, 'clip_norm': 0.0, 'lr': 1.0}
_MOMENTUM = {
    name: {f'{name}__optim__{field}': x for field, x in _OPTIM.items()}
    for name in ('ppo', 'critic')
}


@functools.cache
def _policy_after(
    clip_eps: float = 0.2, ratio: str = 'token', reduction: str = 'sequence'
) -> Any:
  def loss_fn(params: Any, batch: Any) -> tuple[Array, dict]:
    experience, weights = batch
    logprobs_BT, _ = scoring.response_logprobs(
        tiny.SHAPE, params, experience.sequences, temperature=1.0
    )
    return losses.policy_loss(
        logprobs_BT,
        experience.scored.logprobs_BT,
        experience.targets.advantages_BT,
        weights,
        experience.macro,
        clip_eps=clip_eps,
        ratio=ratio,
    )

  return _updated('policy', loss_fn, MASK, reduction)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('field', 'argument', 'value'),
    [
        ('ppo__clip_eps', 'clip_eps', 0.01),
        ('ppo__ratio', 'ratio', 'macro'),
        ('ppo__ratio', 'ratio', 'geometric'),
        ('ppo__loss_reduction', 'reduction', 'constant'),
        ('ppo__loss_reduction', 'reduction', 'macro'),
    ],
)
def test_a_field_of_the_policy_loss_changes_the_update(
    field: str, argument: str, value: Any
) -> None:
  found = _by_programs('policy', **{field: value}, **_MOMENTUM['ppo'])
  expected = _policy_after(**{argument: value})
  _assert_changed_alike(found, expected, POLICY, _policy_after())


@functools.cache
def _critic_after(
    eps: float = 0.2, starts: bool = False, reduction: str = 'sequence'
) -> Any:
  mask_BT = _EXPERIENCE.macro.starts_BT if starts else MASK

  def loss_fn(params: Any, batch: Any) -> tuple[Array, dict]:
    experience, weights = batch
    return losses.value_loss(
        scoring.response_values(tiny.SHAPE, params, experience.sequences),
        experience.scored.values_BT,
        experience.targets.returns_BT,
        weights,
        mask_BT,
        clip_eps=eps,
    )

  return _updated('critic', loss_fn, mask_BT, reduction)


@pytest.mark.parametrize(
    ('field', 'value', 'explicit'),
    [
        ('critic__clip_eps', 0.01, {'eps': 0.01}),
        ('critic__target', 'starts', {'starts': True}),
        ('ppo__loss_reduction', 'constant', {'reduction': 'constant'}),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else '',
)
def test_a_field_of_the_critic_loss_changes_the_update(
    field: str, value: Any, explicit: dict[str, Any]
) -> None:
  found = _by_programs('critic', **{field: value}, **_MOMENTUM['critic'])
  expected = _critic_after(**explicit)
  _assert_changed_alike(found, expected, CRITIC, _critic_after())


def test_the_coefficient_is_drawn_to_the_target_of_the_config() -> None:
  fields = {'ppo__kl_horizon': 50, 'ppo__batch_size': 8}
  programs, _ = _programs(ppo__kl_target=2.0, **fields)
  given = {'kl_coef': jnp.float32(0.05)}, {'objective/kl': jnp.float32(2.2)}
  # 2.2 / 2 - 1 = .1; 8 responses of 50: .05 * (1 + .1 * 8 / 50)
  found = programs.adapt_kl(*given)
  np.testing.assert_allclose(found['kl_coef'], 0.05 * 1.016, rtol=1e-6)
  without, _ = _programs(**fields)
  assert without.adapt_kl(*given) == {}
