"""Token rewards, macro actions and targets are wired as the config says."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.rollout import sampling, scoring
from ma_rlhf_jax.structs import (
    Experience,
    MacroActions,
    Rollout,
    Scored,
    SequenceBatch,
)
from ma_rlhf_jax.training import buckets
from ma_rlhf_jax.training import experience as lib
from tests import tiny, tolerance

NAN = math.nan
MASK = jnp.array([[True, True, True, True], [True, True, False, False]])
# Log-ratios .2 .4 -.6 .8 and -.4 .2; scores beyond and within +-2.5.
SCORED = Scored(
    logprobs_BT=jnp.array([[-1.0, -2, -3, -1], [-0.5, -1, NAN, NAN]]),
    ref_logprobs_BT=jnp.array(
        [[-1.2, -2.4, -2.4, -1.8], [-0.1, -1.2, NAN, NAN]]
    ),
    entropy_BT=jnp.array([[1.0, 2, 3, 4], [2, 6, NAN, NAN]]),
    values_BT=jnp.array([[0.5, 7, -0.25, 9], [1.5, 3, NAN, NAN]]),
    score_B=jnp.array([4.0, -1.5]),
)
FIELDS = {
    'ppo__kl_coef': 0.5,
    'ppo__score_clip': 2.5,
    'ppo__gamma': 0.8,
    'ppo__gae_lambda': 0.5,
    'macro__ngram': 2,
    'critic__target': 'macro',
}


def _macro(ngram: int) -> MacroActions:
  starts = termination.fixed(MASK, ngram=ngram)
  return termination.macro_actions(starts, MASK)


def _targets(ngram: int = 2, **fields) -> tuple:
  config = tiny.config(**{**FIELDS, **fields})
  return lib.make_targets(SCORED, _macro(ngram), config)


def test_rewards_by_hand():
  # -.5 * log-ratio; 4 is clipped to 2.5 on the last token.
  _, rewards = _targets()
  want = [[-0.1, -0.2, 0.3, -0.4 + 2.5], [0.2, -0.1 - 1.5, 0, 0]]
  np.testing.assert_allclose(rewards, want, rtol=1e-5)
  _, rewards = _targets(ppo__score_clip=0.0, ppo__kl_coef=2.0)
  want = [[-0.4, -0.8, 1.2, -1.6 + 4], [0.8, -0.4 - 1.5, 0, 0]]
  np.testing.assert_allclose(rewards, want, rtol=1e-5)


def test_targets_of_two_token_macros_by_hand():
  # Row 0: rewards -.3 and 2.4, values of the starts .5 and -.25.
  #   A_1 = 2.4 + .25 = 2.65
  #   A_0 = -.3 + .8 * -.25 - .5 + .8 * .5 * 2.65 = .06
  # Row 1: reward -1.4, value 1.5: A = -2.9
  targets, _ = _targets()
  want = [[0.06, 0.06, 2.65, 2.65], [-2.9, -2.9, 0, 0]]
  np.testing.assert_allclose(targets.advantages_BT, want, rtol=1e-5, atol=1e-6)
  # A + V
  want = [[0.56, 0.56, 2.4, 2.4], [-1.4, -1.4, 0, 0]]
  np.testing.assert_allclose(targets.returns_BT, want, rtol=1e-5)


def test_macro_reward_value_and_critic_target_are_passed_on():
  # Means: rewards -.15 and 1.2 and -.7; values 3.75, 4.375 and 2.25.
  #   A_1 = 1.2 - 4.375; A_0 = -.15 + 3.5 - 3.75 + .4 * -3.175 = -1.67
  targets, _ = _targets(macro__reward='mean', macro__value='equal')
  want = [[-1.67, -1.67, -3.175, -3.175], [-2.95, -2.95, 0, 0]]
  np.testing.assert_allclose(targets.advantages_BT, want, rtol=1e-5)
  # Each token's own return, gamma and lambda at the ends of macro actions.
  # Row 1: both tokens see what is left: -1.4 and -1.6.
  targets, _ = _targets(critic__target='token')
  np.testing.assert_allclose(targets.returns_BT[1, :2], [-1.4, -1.6], rtol=1e-5)


def test_whitened_advantages_have_mean_zero_and_variance_one():
  plain, _ = _targets()
  white, _ = _targets(ppo__whiten_advantages=True)
  real = np.asarray(plain.advantages_BT[MASK])  # .06 .06 2.65 2.65 -2.9 -2.9
  want = (real - real.mean()) / real.std()
  np.testing.assert_allclose(white.advantages_BT[MASK], want, rtol=1e-4)
  assert not white.advantages_BT[~MASK].any()
  np.testing.assert_array_equal(white.returns_BT, plain.returns_BT)


def test_metrics_by_hand():
  targets, rewards = _targets()
  tokens = jnp.zeros((2, 7), jnp.int32)
  made = Experience(
      sequences=SequenceBatch(tokens, tokens == 0, MASK),
      scored=SCORED,
      macro=_macro(2),
      targets=targets,
  )
  told = lib.experience_metrics(made, rewards)
  told |= lib.critic_metrics(made, rewards, tiny.config(**FIELDS))
  got = {k: float(v) for k, v in told.items()}
  log_ratios = np.array([0.2, 0.4, -0.6, 0.8, -0.4, 0.2])
  # Macro actions: -.3 + .8 * 2.4, 2.4; -1.4, against values of their starts.
  to_go = np.array([1.62, 2.4, -1.4])
  errors = to_go - np.array([0.5, -0.25, 1.5])
  returns = np.array([0.56, 0.56, 2.4, 2.4, -1.4, -1.4])
  want = {
      'objective/kl': (0.8 - 0.2) / 2,  # summed over each response
      'objective/kl_k3': np.mean(np.exp(-log_ratios) - 1 + log_ratios),
      'objective/entropy': 18 / 6,
      'objective/score': 1.25,
      'objective/score_std': 2.75,
      'objective/rlhf_reward': (2.1 - 1.4) / 2,
      'response/length': 3,
      'response/length_max': 4,
      'critic/value': (0.5 + 7 - 0.25 + 9 + 1.5 + 3) / 6,
      'critic/return': returns.mean(),
      'critic/explained_variance': 1 - errors.var() / to_go.var(),
      'critic/bias': -errors.mean(),
      'policy/advantage_std': np.std([0.06, 0.06, 2.65, 2.65, -2.9, -2.9]),
      'macro/length_mean': 2,
      'macro/length_p95': 2,
      'macro/per_response': 1.5,
      'tokens': 14,
  }
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-4, err_msg=name)


def _critic(
    values: np.ndarray, scores: list[float], ngram: int, **fields: Any
) -> dict[str, float]:
  """Metrics of a critic where a response earns its score alone, at its end."""
  mask = jnp.ones(values.shape, bool)
  zeros = jnp.zeros(values.shape)
  scored = Scored(zeros, zeros, zeros, jnp.asarray(values), jnp.array(scores))
  starts = termination.fixed(mask, ngram=ngram)
  macro = termination.macro_actions(starts, mask)
  config = tiny.config(ppo__score_clip=0.0, macro__ngram=ngram, **fields)
  targets, rewards = lib.make_targets(scored, macro, config)
  tokens = jnp.zeros(values.shape, jnp.int32)
  made = Experience(SequenceBatch(tokens, mask, mask), scored, macro, targets)
  told = lib.critic_metrics(made, rewards, config)
  return {name.removeprefix('critic/'): float(x) for name, x in told.items()}


_LENGTH = 400
_SCORES = [1.0, 1, -1, -1]


@pytest.mark.parametrize('ngram', [1, 5])
@pytest.mark.parametrize('target', ['token', 'macro', 'starts'])
def test_a_critic_that_knows_nothing_explains_nothing(
    ngram: int, target: str
) -> None:
  # One value for each response that has nothing to do with its score: errors
  # 0, 2, -2, 0 have twice the variance of the scores. Of lambda-returns, which
  # are made of the values, .95 and .66 would be explained (n = 1 and 5).
  values = np.repeat([[1.0], [-1], [1], [-1]], _LENGTH, axis=1)
  found = _critic(values, _SCORES, ngram, critic__target=target)
  assert found['explained_variance'] == pytest.approx(-1, abs=1e-5)
  assert found['bias'] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('ngram', [1, 5])
def test_a_critic_that_is_100_too_high_says_so(ngram: int) -> None:
  values = np.repeat([[101.0], [101], [99], [99]], _LENGTH, axis=1)
  found = _critic(values, _SCORES, ngram)
  assert found['explained_variance'] == pytest.approx(1, abs=1e-5)
  assert found['bias'] == pytest.approx(100, abs=1e-4)


@pytest.mark.parametrize('ngram', [1, 5])
def test_of_constant_rewards_to_go_no_variance_is_explained(ngram: int) -> None:
  values = np.random.default_rng(0).normal(size=(4, _LENGTH)) + 3.3
  found = _critic(values.astype(np.float32), [3.3] * 4, ngram)
  assert found['explained_variance'] == 0
  want = (values[:, ::ngram] - 3.3).mean()
  assert found['bias'] == pytest.approx(want, abs=1e-5)


SHAPES = lib.Models(*[tiny.SHAPE] * 4)
PARAMS = lib.Models(
    policy=tiny.params('policy', 0),
    ref_policy=tiny.params('policy', 1),
    critic=tiny.params('scalar', 2),
    reward_model=tiny.params('scalar', 3),
)


@pytest.fixture(scope='module')
def scored_and_bounds() -> tuple[Scored, list[float]]:
  """What the four models say of rows in one batch, and how far it is off."""
  score = jax.jit(
      functools.partial(
          lib.score_sequences,
          SHAPES,
          temperature=0.7,
          chunk_tokens=8,
          split=buckets.Buckets((0,), (4,)),
      )
  )
  rows = tiny.sequences([0, 1, 2, 3])
  bounds = tiny.rounding(lambda models: score(models, rows), PARAMS)
  return score(PARAMS, rows), bounds


@pytest.fixture
def scored(scored_and_bounds: tuple[Scored, list[float]]) -> Scored:
  return scored_and_bounds[0]


def test_each_model_fills_its_own_field(
    scored_and_bounds: tuple[Scored, list[float]],
):
  scored, bounds = scored_and_bounds
  rows = tiny.sequences([0, 1, 2, 3])
  logprobs = jax.jit(
      functools.partial(
          scoring.response_logprobs,
          tiny.SHAPE,
          sequences=rows,
          temperature=0.7,
          chunk_tokens=99,
          with_entropy=True,
      )
  )
  policy, entropy = logprobs(PARAMS.policy)
  ref_policy, _ = logprobs(PARAMS.ref_policy)
  values = jax.jit(functools.partial(scoring.response_values, tiny.SHAPE))
  scores = jax.jit(functools.partial(scoring.sequence_scores, tiny.SHAPE))
  want = Scored(
      logprobs_BT=policy,
      ref_logprobs_BT=ref_policy,
      entropy_BT=entropy,
      values_BT=values(PARAMS.critic, rows),
      score_B=scores(PARAMS.reward_model, rows),
  )
  tolerance.assert_close(scored, want, bounds)


@pytest.fixture(scope='module')
def made() -> tuple:
  """Experience cut by the perplexity rule, scored in two micro-batches."""
  rows = tiny.sequences([0, 1, 2, 3])
  mask = rows.response_mask_BT
  rollout = Rollout(
      sequences=rows,
      sample_logprobs_BT=jnp.where(mask, -0.5, NAN),
      kept_mass_BT=jnp.where(mask, 0.75, NAN),
  )
  ids = jnp.arange(4)
  score = functools.partial(
      lib.score_sequences,
      SHAPES,
      temperature=0.7,
      chunk_tokens=8,
      split=buckets.Buckets((0,), (2,)),
  )
  config = tiny.config(macro__termination='ppl', **FIELDS)
  make = functools.partial(lib.make_experience, config=config)
  return jax.jit(make)(
      rollout,
      jax.jit(score)(PARAMS, rollout.sequences),
      sampling.row_keys(jax.random.key(0), 0, ids, ids),
      jnp.float32(config.ppo.kl_coef),
      None,
  )


def test_micro_batches_score_like_the_whole(
    made: tuple, scored_and_bounds: tuple[Scored, list[float]]
):
  tolerance.assert_close(made[0].scored, *scored_and_bounds)


def test_perplexity_is_that_of_the_reference(made: tuple, scored: Scored):
  mask = made[0].macro.mask_BT
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


def test_sampler_is_compared_with_the_scorer(made: tuple, scored: Scored):
  mask = np.asarray(made[0].macro.mask_BT)
  gap = (-0.5 - np.asarray(scored.logprobs_BT))[mask].mean()
  np.testing.assert_allclose(made[1]['sampler/kl'], gap, rtol=1e-5)
  np.testing.assert_allclose(made[1]['sampler/cut_mass'], 0.25, rtol=1e-6)
