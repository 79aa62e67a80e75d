"""What a step forms of scores, and its order."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.ppo import learn, metrics, step
from ma_rlhf_jax.ppo.host import Asked, HostAnswers
from ma_rlhf_jax.rollout import sampling
from ma_rlhf_jax.structs import Models, Rollout
from ma_rlhf_jax.training import buckets
from tests import tiny
from tests.ppo import given

MASK, SCORED = given.MASK, given.SCORED


# What the experience holds.


def test_rewards_by_hand():
  # -.5 * log-ratio; 4 is clipped to 2.5 on the last token.
  _, rewards = given.experience()
  want = [[-0.1, -0.2, 0.3, -0.4 + 2.5], [0.2, -0.1 - 1.5, 0, 0]]
  np.testing.assert_allclose(rewards, want, rtol=1e-5)
  _, rewards = given.experience(kl_coef=2.0, ppo__score_clip=0.0)
  want = [[-0.4, -0.8, 1.2, -1.6 + 4], [0.8, -0.4 - 1.5, 0, 0]]
  np.testing.assert_allclose(rewards, want, rtol=1e-5)


def test_targets_of_two_token_macros_by_hand():
  # Row 0: rewards -.3 and 2.4, values of the starts .5 and -.25.
  #   A_1 = 2.4 + .25 = 2.65
  #   A_0 = -.3 + .8 * -.25 - .5 + .8 * .5 * 2.65 = .06
  # Row 1: reward -1.4, value 1.5: A = -2.9
  made, _ = given.experience()
  want = [[0.06, 0.06, 2.65, 2.65], [-2.9, -2.9, 0, 0]]
  got = made.targets.advantages_BT
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  # A + V
  want = [[0.56, 0.56, 2.4, 2.4], [-1.4, -1.4, 0, 0]]
  np.testing.assert_allclose(made.targets.returns_BT, want, rtol=1e-5)


def test_macro_reward_value_and_critic_target_are_passed_on():
  # Means: rewards -.15 and 1.2 and -.7; values 3.75, 4.375 and 2.25.
  #   A_1 = 1.2 - 4.375; A_0 = -.15 + 3.5 - 3.75 + .4 * -3.175 = -1.67
  made, _ = given.experience(macro__reward='mean', macro__value='equal')
  want = [[-1.67, -1.67, -3.175, -3.175], [-2.95, -2.95, 0, 0]]
  np.testing.assert_allclose(made.targets.advantages_BT, want, rtol=1e-5)
  # Each token's own return, gamma and lambda at the ends of macro actions.
  # Row 1: both tokens see what is left: -1.4 and -1.6.
  made, _ = given.experience(critic__target='token')
  got = made.targets.returns_BT[1, :2]
  np.testing.assert_allclose(got, [-1.4, -1.6], rtol=1e-5)


def test_whitened_advantages_have_mean_zero_and_variance_one():
  plain = given.experience()[0].targets
  white = given.experience(ppo__whiten_advantages=True)[0].targets
  real = np.asarray(plain.advantages_BT[MASK])  # .06 .06 2.65 2.65 -2.9 -2.9
  want = (real - real.mean()) / real.std()
  np.testing.assert_allclose(white.advantages_BT[MASK], want, rtol=1e-4)
  assert not white.advantages_BT[~MASK].any()
  np.testing.assert_array_equal(white.returns_BT, plain.returns_BT)


def test_starts_of_the_host_make_the_macro_actions():
  starts = jnp.array([[True, True, False, True], [True, False, False, False]])
  rule = {'macro__termination': 'parsing', 'macro__parser': 'nowhere:f'}
  made, _ = given.experience(host=HostAnswers(starts), **rule)
  assert made.macro.ids_BT.tolist() == [[0, 1, 1, 2], [0, 0, 4, 4]]


def test_the_host_adds_its_score_to_that_of_the_reward_model():
  # Scores 4 and -1.5; together -1.5 and 1, within the clip range.
  host = HostAnswers(score_B=jnp.array([-5.5, 2.5]))
  made, rewards = given.experience(host=host)
  np.testing.assert_allclose(made.scored.score_B, [-1.5, 1.0])
  want = [[-0.1, -0.2, 0.3, -0.4 - 1.5], [0.2, -0.1 + 1, 0, 0]]
  np.testing.assert_allclose(rewards, want, rtol=1e-5)
  alone = SCORED.replace(score_B=None)
  made, _ = given.experience(scored=alone, host=host)
  np.testing.assert_allclose(made.scored.score_B, [-5.5, 2.5])


# The same of models that are asked.

PARAMS = Models(
    policy=tiny.params('policy', 0),
    ref_policy=tiny.params('policy', 1),
    critic=tiny.params('scalar', 2),
    reward_model=tiny.params('scalar', 3),
)


@pytest.fixture(scope='module')
def made() -> tuple:
  """Experience cut by the perplexity rule, and its metrics."""
  rows = tiny.sequences([0, 1, 2, 3])
  mask = rows.response_mask_BT
  rollout = Rollout(
      sequences=rows,
      sample_logprobs_BT=jnp.where(mask, -0.5, given.NAN),
      kept_mass_BT=jnp.where(mask, 0.75, given.NAN),
  )
  method = given.method(0.7, macro__termination='ppl', **given.FIELDS)
  ids, kl_coef = jnp.arange(4), jnp.float32(0.5)

  @jax.jit
  def make(rollout: Rollout, params: Models) -> tuple:
    split = buckets.Buckets((0,), (4,))
    scored = learn.score(params, rollout.sequences, method=method, split=split)
    keys_B = sampling.row_keys(jax.random.key(0), 0, ids, ids)
    made, rewards = step.form_experience(
        rollout.sequences, scored, keys_B, kl_coef, HostAnswers(), method
    )
    objective = method.objective
    return made, metrics.describe(rollout, made, rewards, kl_coef, objective)

  return make(rollout, PARAMS)


def test_perplexity_is_that_of_the_reference(made: tuple):
  mask, scored = made[0].macro.mask_BT, made[0].scored
  want = termination.ppl(scored.ref_logprobs_BT, mask)
  np.testing.assert_array_equal(made[0].macro.starts_BT, want)
  other = termination.ppl(scored.logprobs_BT, mask)
  assert (np.asarray(other) != np.asarray(want)).any()


def test_experience_is_finite_and_empty_on_padding(made: tuple):
  experience, metrics = made
  pads = ~np.asarray(experience.macro.mask_BT)
  for x in jax.tree.leaves((experience.scored, experience.targets)):
    assert np.isfinite(x).all()
    assert x.ndim == 1 or not np.asarray(x)[pads].any()
  assert all(np.isfinite(x) for x in metrics.values())


def test_sampler_is_compared_with_the_scorer(made: tuple):
  mask = np.asarray(made[0].macro.mask_BT)
  gap = (-0.5 - np.asarray(made[0].scored.logprobs_BT))[mask].mean()
  np.testing.assert_allclose(made[1]['sampler/kl'], gap, rtol=1e-5)
  np.testing.assert_allclose(made[1]['sampler/cut_mass'], 0.25, rtol=1e-6)


# The order of things.


class _Programs:
  """Says what was run, and which states each was given."""

  def __init__(
      self,
      trained: tuple[str, ...] = ('policy', 'critic'),
      fused: tuple[str, ...] = (),
  ):
    self.log: list[str] = []
    self.trained = lambda index: trained
    self.fused = lambda index: fused
    self.spec = types.SimpleNamespace(key=lambda stream: stream)

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__'):
      raise AttributeError(name)
    return functools.partial(self._run, name)

  def _run(self, name: str, *args: Any) -> Any:
    self.log.append(' '.join([name, *(x for x in args if x in _MODELS)]))
    return {
        'models': types.SimpleNamespace(policy='weights'),
        'to_decode': 'laid out',
        'rollout': 'rollout',
        'macro_keys': 'keys',
        'ask_host': Asked('answers', {'asked': 1}),
        'score': 'scored',
        'experience': ('experience', {'made': 2}),
        'score_and_learn': (
            {name: f'new {name}' for name in self.fused(0)},
            'experience',
            {'made': 2},
            {name: {'loss': 3} for name in self.fused(0)},
        ),
        'update': (f'new {args[0]}', {'loss': 3}),
        'adapt_kl': {'kl_coef': 'new kl_coef'},
        'describe_updates': {'updates': 4},
    }[name]


_MODELS = ('policy', 'critic')
_STATES = {name: f'old {name}' for name in (*_MODELS, 'kl_coef')}


@pytest.mark.parametrize(
    ('how', 'order'),
    [
        (
            {},
            ['score', 'ask_host', 'experience', 'update policy']
            + ['update critic', 'adapt_kl'],
        ),
        (
            {'fused': ('policy', 'critic')},
            ['ask_host', 'score_and_learn', 'adapt_kl'],
        ),
        (
            {'fused': ('policy',)},
            ['ask_host', 'score_and_learn', 'update critic', 'adapt_kl'],
        ),
        # While the critic warms up, the coefficient waits for the policy.
        (
            {'trained': ('critic',)},
            ['score', 'ask_host', 'experience', 'update critic'],
        ),
        (
            {'trained': ('policy',)},
            ['score', 'ask_host', 'experience', 'update policy', 'adapt_kl'],
        ),
    ],
    ids=['apart', 'joint', 'policy', 'warm-up', 'without a critic'],
)
def test_a_step_runs_its_programs_in_order(how: dict, order: list[str]):
  programs = _Programs(**how)
  states, told = step.take(programs, _STATES, 'prompts', 7)
  assert programs.log == [
      *('models', 'to_decode', 'rollout', 'macro_keys'),
      *order,
      'describe_updates',
  ]
  trained = how.get('trained', _MODELS)
  new = {*trained, 'kl_coef'} if 'policy' in trained else {*trained}
  assert states == {
      name: f'new {name}' if name in new else old
      for name, old in _STATES.items()
  }
  assert told == {'made': 2, 'asked': 1, 'updates': 4}
