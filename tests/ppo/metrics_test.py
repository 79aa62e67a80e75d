"""What is told of rollouts and of the critic, by hand."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import rewards as rewards_lib
from ma_rlhf_jax.objective import targets as targets_lib
from ma_rlhf_jax.ppo import metrics
from ma_rlhf_jax.structs import Experience, Rollout, Scored, SequenceBatch
from tests import tiny
from tests.ppo import given


def test_metrics_by_hand() -> None:
  made, rewards = given.experience()
  objective = given.method(**given.FIELDS).objective
  told = metrics.experience_metrics(made, rewards)
  told |= metrics.critic_metrics(made, rewards, objective)
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


def _described(**fields: Any) -> dict[str, float]:
  made, rewards = given.experience(**fields)
  mask = given.MASK
  rollout = Rollout(
      given.SEQUENCES,
      sample_logprobs_BT=jnp.where(mask, -0.75, given.NAN),
      kept_mass_BT=jnp.where(mask, 0.9, given.NAN),
  )
  objective = given.method(**given.FIELDS | fields).objective
  told = metrics.describe(rollout, made, rewards, jnp.float32(0.4), objective)
  return {name: float(x) for name, x in told.items()}


def test_a_step_tells_of_its_coefficient_and_of_the_sampler() -> None:
  found = _described()
  made, rewards = given.experience()
  objective = given.method(**given.FIELDS).objective
  parts = metrics.experience_metrics(made, rewards)
  parts |= metrics.critic_metrics(made, rewards, objective)
  want = {name: float(x) for name, x in parts.items()}
  # Log-probs add up to -8.5 over six tokens.
  want['sampler/kl'] = -0.75 + 8.5 / 6
  want['sampler/cut_mass'] = 0.1
  want['objective/kl_coef'] = 0.4
  assert found.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_nothing_is_told_of_a_critic_that_there_is_not() -> None:
  fields = {'ppo__baseline': 'rloo', 'ppo__samples_per_prompt': 2}
  with_one, without = _described(), _described(**fields)
  gone = with_one.keys() - without.keys()
  assert gone == {name for name in with_one if name.startswith('critic/')}
  assert len(gone) == 4 and without.keys() < with_one.keys()


def _critic(
    values: np.ndarray, scores: list[float], ngram: int, **fields: Any
) -> dict[str, float]:
  """Metrics of a critic where a response earns its score alone, at its end."""
  mask = jnp.ones(values.shape, bool)
  zeros = jnp.zeros(values.shape)
  scored = Scored(zeros, zeros, zeros, jnp.asarray(values), jnp.array(scores))
  starts = termination.fixed(mask, ngram=ngram)
  macro = termination.macro_actions(starts, mask)
  objective = tiny.objective(**fields)
  rewards = rewards_lib.token_rewards(
      zeros, zeros, scored.score_B, mask, kl_coef=0.05, score_clip=0.0
  )
  targets = targets_lib.estimate(scored.values_BT, rewards, macro, objective)
  tokens = jnp.zeros(values.shape, jnp.int32)
  made = Experience(SequenceBatch(tokens, mask, mask), scored, macro, targets)
  told = metrics.critic_metrics(made, rewards, objective)
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
  found = _critic(values, _SCORES, ngram, critic_target=target)
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
