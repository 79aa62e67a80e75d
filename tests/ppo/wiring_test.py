"""Each switch of the config reaches the argument that it is named for.

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
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import Array, Experience, MacroActions, Rollout, Scored
from ma_rlhf_jax.training import experience as lib
from ma_rlhf_jax.training import optim, ppo, ppo_update, update
from ma_rlhf_jax.training.run import Run
from tests import tiny

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


def _experience(**fields: Any) -> Experience:
  config = tiny.config(**{n.replace('.', '__'): v for n, v in fields.items()})
  make = functools.partial(lib.make_experience, config=config)
  return make(ROLLOUT, SCORED, KEYS, jnp.float32(config.ppo.kl_coef), None)[0]


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
def test_a_field_of_the_rules_reaches_its_setting(
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

# What `base()` says, as arguments of `macro_targets`.
_ESTIMATION = {
    'gamma': 1.0,
    'gae_lambda': 0.95,
    'critic_lambda': 0.95,
    'discount': 'macro',
    'reward': 'sum',
    'value': 'start',
    'advantage': 'shared',
    'critic_target': 'token',
}
_TOKENS = {'gamma': 0.8}
_MACRO = {'critic_target': 'macro'}


@pytest.mark.parametrize(
    ('base', 'field', 'argument', 'value'),
    [
        ({}, 'ppo.gamma', 'gamma', 0.8),
        ({'critic_lambda': 0.95}, 'ppo.gae_lambda', 'gae_lambda', 0.5),
        ({}, 'critic.gae_lambda', 'critic_lambda', 0.3),
        (_TOKENS, 'ppo.discount', 'discount', 'token'),
        (_MACRO, 'macro.reward', 'reward', 'mean'),
        ({}, 'macro.value', 'value', 'equal'),
        ({}, 'ppo.advantage', 'advantage', 'own'),
        ({}, 'critic.target', 'critic_target', 'macro'),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else '',
)
def test_a_field_of_the_estimation_reaches_its_argument(
    base: dict[str, Any], field: str, argument: str, value: Any
) -> None:
  names = {
      'gamma': 'ppo.gamma',
      'critic_lambda': 'critic.gae_lambda',
      'critic_target': 'critic.target',
  }
  fields = {names[name]: x for name, x in base.items()} | {field: value}
  found = _experience(**fields, **{'macro.ngram': 3})
  rewards_BT = rewards.token_rewards(
      OLD, REF, SCORED.score_B, MASK, kl_coef=0.05, score_clip=2.5
  )
  want = lambda **how: targets.macro_targets(
      SCORED.values_BT, rewards_BT, found.macro, **how
  )
  _same(found.targets, want(**_ESTIMATION | base | {argument: value}))
  assert _differ(found.targets, want(**_ESTIMATION | base))


def test_the_coefficient_that_was_adapted_weighs_the_rewards() -> None:
  make = functools.partial(lib.make_experience, config=tiny.config())
  found, metrics = make(ROLLOUT, SCORED, KEYS, jnp.float32(0.4), None)
  rewards_BT = rewards.token_rewards(
      OLD, REF, SCORED.score_B, MASK, kl_coef=0.4, score_clip=2.5
  )
  want = targets.macro_targets(
      SCORED.values_BT, rewards_BT, found.macro, **_ESTIMATION
  )
  _same(found.targets, want)
  assert metrics['objective/kl_coef'] == np.float32(0.4)


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
SHAPES = lib.Models(*[tiny.SHAPE] * 4)


def _stage(**fields: Any) -> ppo.PPO:
  run: Run = tiny.run('unused', tiny.config(**fields))
  copy = lambda params: jax.tree.map(jnp.array, params)
  params = lib.Models(copy(POLICY), POLICY, copy(CRITIC), CRITIC)
  return ppo.PPO(run, SHAPES, params)


_NOW, _ = scoring.response_logprobs(
    tiny.SHAPE, POLICY, ROWS, temperature=1.0, chunk_tokens=8
)
_EXPERIENCE = _experience(**{'macro.ngram': 3})
# Ratios from .8 to 1.2 or so.
_EXPERIENCE = _EXPERIENCE.replace(
    scored=SCORED.replace(logprobs_BT=_NOW + _random(5, 0.1))
)


def _updated(model: str, loss_fn: Any, mask: Any, *, reduction: str) -> Any:
  """What `update_on` makes of the state of a model, all values explicit."""
  name = {'policy': 'ppo', 'critic': 'critic'}[model]
  config = tiny.config(**_MOMENTUM[name])
  optimizer = optim.make_optimizer(config[name].optim, 3)
  params = {'policy': POLICY, 'critic': CRITIC}[model]

  def weigh(batch: Experience) -> Array:
    starts_BT = batch.macro.starts_BT
    return losses.loss_weights(mask(batch), starts_BT, reduction=reduction)

  state, _ = ppo_update.update_on(
      update.init_state(params, optimizer),
      {},
      _EXPERIENCE,
      jax.random.key(0),
      loss_fn=loss_fn,
      weigh=weigh,
      optimizer=optimizer,
      ppo=config.ppo,
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
def _policy_after(**how: Any) -> Any:
  how = {'clip_eps': 0.2, 'ratio': 'token'} | how
  reduction = how.pop('reduction', 'sequence')
  loss_fn = functools.partial(
      ppo_update.policy_loss_fn,
      shape=tiny.SHAPE,
      temperature=1.0,
      chunk_tokens=8,
      **how,
  )
  mask = lambda batch: batch.macro.mask_BT
  return _updated('policy', loss_fn, mask, reduction=reduction)


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
def test_a_field_of_the_policy_loss_reaches_its_argument(
    field: str, argument: str, value: Any
) -> None:
  stage = _stage(**{field: value}, **_MOMENTUM['ppo'])
  found, _ = stage._updates['policy'](
      stage.states['policy'], {}, _EXPERIENCE, jax.random.key(0)
  )
  expected = _policy_after(**{argument: value})
  _assert_changed_alike(found.params, expected, POLICY, _policy_after())


@functools.cache
def _critic_after(
    eps: float = 0.2, starts: bool = False, reduction: str = 'sequence'
) -> Any:
  mask = lambda batch: batch.macro.starts_BT if starts else batch.macro.mask_BT

  def loss_fn(params: Any, batch: Any) -> tuple[Array, dict]:
    experience, weights = batch
    return losses.value_loss(
        scoring.response_values(tiny.SHAPE, params, experience.sequences),
        experience.scored.values_BT,
        experience.targets.returns_BT,
        weights,
        mask(experience),
        clip_eps=eps,
    )

  return _updated('critic', loss_fn, mask, reduction=reduction)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('critic__clip_eps', 0.01),
        ('critic__target', 'starts'),
        ('ppo__loss_reduction', 'constant'),
    ],
)
def test_a_field_of_the_critic_loss_reaches_its_argument(
    field: str, value: Any
) -> None:
  stage = _stage(**{field: value}, **_MOMENTUM['critic'])
  explicit = {
      'critic__clip_eps': {'eps': value},
      'critic__target': {'starts': True},
      'ppo__loss_reduction': {'reduction': value},
  }[field]
  found, _ = stage._updates['critic'](
      stage.states['critic'], {}, _EXPERIENCE, jax.random.key(0)
  )
  expected = _critic_after(**explicit)
  _assert_changed_alike(found.params, expected, CRITIC, _critic_after())


def test_the_coefficient_is_drawn_to_the_target_of_the_config() -> None:
  stage = _stage(ppo__kl_target=2.0, ppo__kl_horizon=50, ppo__batch_size=8)
  # 2.2 / 2 - 1 = .1; 8 responses of 50: .05 * (1 + .1 * 8 / 50)
  found = stage._adapt(jnp.float32(0.05), jnp.float32(2.2))
  np.testing.assert_allclose(found, 0.05 * 1.016, rtol=1e-6)


def test_the_rule_of_the_host_has_the_fields_of_the_config(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  from ma_rlhf_jax.training import run as run_lib

  seen = []
  monkeypatch.setattr(
      run_lib, 'HostTermination', lambda settings, _: seen.append(settings)
  )
  fields = {
      'parser': 'tests.trees:parse',
      'parse_cutoff': 3,
      'parse_fallback': 'one',
      'parse_workers': 2,
      'ngram': 7,
  }
  config = tiny.config(
      macro__termination='parsing',
      **{f'macro__{name}': value for name, value in fields.items()},
  )
  tiny.run(tmp_path, config).host_termination()
  (settings,) = seen
  assert {name: getattr(settings, name) for name in fields} == fields
