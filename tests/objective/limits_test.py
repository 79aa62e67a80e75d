"""One macro action per response is REINFORCE with a learned baseline."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import losses, rewards, targets
from tests import tiny

KL_COEF, SCORE_CLIP = 0.1, 2.5


@functools.partial(jax.jit, static_argnames=('reduction', 'ratio'))
def _gradient(case: dict, gae_lambda: float, *, reduction: str, ratio: str):
  """d loss / d logprobs at ratio 1, through the shipped functions."""
  mask = case['mask']
  keys = jax.random.split(jax.random.key(0), len(mask))
  macro = termination.segment(
      termination.TerminationInputs(mask, case['ref'], keys),
      termination.TerminationSettings('fixed', ngram=0),
  )
  token_rewards = rewards.token_rewards(
      case['logprobs'],
      case['ref'],
      case['score'],
      mask,
      kl_coef=KL_COEF,
      score_clip=SCORE_CLIP,
  )
  made = targets.macro_targets(
      case['values'],
      token_rewards,
      macro,
      tiny.objective(
          gamma=1.0,
          gae_lambda=gae_lambda,
          critic_lambda=-1.0,
          discount='macro',
          pool_rewards='sum',
          pool_values='start',
          advantage='shared',
          critic_target='token',
      ),
  )
  weights = losses.loss_weights(mask, macro.starts_BT, reduction=reduction)
  return jax.grad(
      lambda x: losses.policy_loss(
          x,
          case['logprobs'],
          made.advantages_BT,
          weights,
          macro,
          clip_eps=0.2,
          ratio=ratio,
      )[0]
  )(case['logprobs'])


def _case(seed: int) -> dict:
  rng = np.random.default_rng(seed)
  rows, columns = int(rng.integers(1, 7)), 13
  lengths = rng.integers(0, columns + 1, size=(rows, 1))
  lengths[0] = 4
  mask = np.arange(columns)[None] < lengths
  logprobs, ref, values = (
      np.where(mask, rng.normal(size=mask.shape), np.nan) for _ in range(3)
  )
  score = 2 * rng.normal(size=rows)
  return dict(mask=mask, logprobs=logprobs, ref=ref, values=values, score=score)


@pytest.mark.parametrize(
    'ratio',
    [
        pytest.param(x, marks=() if x == 'macro' else pytest.mark.slow)
        for x in losses.RATIOS
    ],
)
def test_one_macro_action_is_reinforce_with_a_learned_baseline(ratio: str):
  """-(R - V(prompt)) / (B T), or over the row's tokens and the rows."""
  with jax.enable_x64(True):
    for seed, gae_lambda in itertools.product(range(4), (0.0, 0.5, 1.0)):
      case = _case(seed)
      mask = case['mask']
      rows = int(mask.any(axis=1).sum())
      made = {
          reduction: np.asarray(
              _gradient(case, gae_lambda, reduction=reduction, ratio=ratio)
          )
          for reduction in ('constant', 'sequence')
      }
      for row, real in enumerate(mask):
        length = int(real.sum())
        if not length:
          continue
        penalty = KL_COEF * sum(
            case['logprobs'][row, t] - case['ref'][row, t]
            for t in range(length)
        )
        score = min(max(case['score'][row], -SCORE_CLIP), SCORE_CLIP)
        advantage = score - penalty - case['values'][row, 0]
        for reduction, divisor in (
            ('constant', mask.size),
            ('sequence', length * rows),
        ):
          want = np.where(real, -advantage / divisor, 0)
          np.testing.assert_allclose(
              made[reduction][row], want, rtol=0, atol=1e-12
          )


def test_the_infinite_n_is_also_a_large_one():
  mask = jnp.asarray(_case(0)['mask'])
  starts = [termination.fixed(mask, ngram=n) for n in (0, 13, 10**6)]
  assert (starts[0] == starts[1]).all() and (starts[0] == starts[2]).all()
