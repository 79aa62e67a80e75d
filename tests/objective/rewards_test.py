"""Token rewards and KL estimates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.objective import rewards

# Three tokens, four tokens, none.
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
LOGPROBS = np.array([[-1, -2, -3, 9], [-4, -1, -2, -5], [9] * 4], 'float32')
REF = np.array([[-3, -2, -7, 7], [-1, -1, -6, -3], [7] * 4], 'float32')
SCORE = np.array([4.0, -1.5, 2.0], 'float32')
token_rewards = jax.jit(
    rewards.token_rewards, static_argnames=('kl_coef', 'score_clip')
)


def _rewards(pad: float = 0.0, order=(0, 1, 2), **kwargs):
  fill = lambda x: np.where(MASK, x, np.float32(pad))[list(order)]
  return token_rewards(
      fill(LOGPROBS),
      fill(REF),
      SCORE[list(order)],
      MASK[list(order)],
      **({'kl_coef': 0.5, 'score_clip': 2.5} | kwargs),
  )


# -0.5 * (2, 0, 4), then + 2.5 (4 clipped); -0.5 * (-3, 0, 4, -2), then - 1.5.
WANT = [[-1, 0, 0.5, 0], [1.5, 0, -2, -0.5], [0, 0, 0, 0]]


def test_rewards_by_hand():
  np.testing.assert_allclose(_rewards(), WANT, rtol=1e-6)


def test_score_clip_zero_means_no_clipping():
  # -2 + 4 on the last token of row 0.
  got = _rewards(score_clip=0)
  np.testing.assert_allclose(got[0], [-1, 0, 2, 0], rtol=1e-6)


def test_without_kl_only_the_last_real_token_is_rewarded():
  got = _rewards(kl_coef=0.0)
  assert np.abs(got).tolist() == [[0, 0, 2.5, 0], [0, 0, 0, 1.5], [0] * 4]


def test_padding_row_order_and_jit_change_nothing():
  np.testing.assert_array_equal(_rewards(pad=math.nan), _rewards())
  order = (2, 0, 1)
  np.testing.assert_array_equal(
      _rewards(order=order), _rewards()[np.array(order)]
  )
  with jax.disable_jit():
    np.testing.assert_allclose(_rewards(), WANT, rtol=1e-6)


def test_gradient_is_zero_on_padding():
  def cost(logprobs):
    got = rewards.token_rewards(
        logprobs,
        jnp.asarray(REF),
        jnp.asarray(SCORE),
        jnp.asarray(MASK),
        kl_coef=0.5,
        score_clip=2.5,
    )
    return jnp.sum(got)

  grad = jax.jit(jax.grad(cost))(jnp.asarray(np.where(MASK, LOGPROBS, np.nan)))
  np.testing.assert_array_equal(grad, np.where(MASK, -0.5, 0))


def test_integer_scores_are_not_truncated_nor_logprobs():
  got = token_rewards(
      jnp.full((1, 2), -0.25),
      jnp.full((1, 2), -0.75),
      jnp.array([3]),
      jnp.ones((1, 2), bool),
      kl_coef=0.1,
      score_clip=2.5,
  )
  # -0.1 * 0.5; + 2.5
  np.testing.assert_allclose(got, [[-0.05, 2.45]], rtol=1e-6)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    args = (jnp.asarray(x, jnp.float64) for x in (LOGPROBS, REF, SCORE))
    got = token_rewards(*args, jnp.asarray(MASK), kl_coef=0.5, score_clip=2.5)
    assert got.dtype == jnp.float64


def test_kl_estimates_by_hand():
  mask = jnp.asarray(MASK)
  nan = np.where(MASK, LOGPROBS, np.float32('nan'))
  k1, k3 = jax.jit(rewards.kl_estimates)(nan, jnp.asarray(REF), mask)
  np.testing.assert_allclose(k1, [6, -1, 0])  # 2 + 0 + 4; -3 + 0 + 4 - 2
  terms = [math.exp(-d) - 1 + d for d in (2, 0, 4, -3, 0, 4, -2)]
  np.testing.assert_allclose(k3, sum(terms) / 7, rtol=1e-6)


def test_k3_stays_finite():
  mask = jnp.ones((1, 1), bool)
  logprobs = jnp.full((1, 1), -800.0)
  _, k3 = rewards.kl_estimates(logprobs, jnp.zeros((1, 1)), mask)
  assert math.isfinite(k3)


def test_the_score_may_be_put_elsewhere_and_is_lost_on_padding():
  mask = jnp.array([[True, True, True, False]] * 2)
  zeros = jnp.zeros((2, 4))
  got = rewards.token_rewards(
      zeros,
      zeros,
      jnp.array([3.0, 4.0]),
      mask,
      kl_coef=0.5,
      score_clip=0.0,
      score_column_B=jnp.array([1, 3]),
  )
  assert got.tolist() == [[0, 3, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ('kl', 'want'),
    [
        (7.0, 0.2 * (1 + 1 / 6 * 0.64)),  # 7/6 - 1
        (60.0, 0.2 * (1 + 0.2 * 0.64)),  # held at +.2
        (0.0, 0.2 * (1 - 0.2 * 0.64)),  # held at -.2
        (6.0, 0.2),
    ],
)
def test_the_kl_coefficient_is_drawn_to_its_target(kl: float, want: float):
  got = rewards.adapted_kl_coef(
      jnp.float32(0.2), jnp.float32(kl), target=6.0, horizon=100, responses=64
  )
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_kl_coefficient_always_comes_back():
  # The largest step that is allowed: 49 of 50 / .2 fall to .02 of it, and
  # rise by 1.98 a step.
  how = {'target': 6.0, 'horizon': 10, 'responses': 49}
  fallen = rewards.adapted_kl_coef(jnp.float32(1), jnp.float32(0), **how)
  np.testing.assert_allclose(fallen, 0.02, rtol=1e-4)
  risen = rewards.adapted_kl_coef(fallen, jnp.float32(60), **how)
  np.testing.assert_allclose(risen, 0.02 * 1.98, rtol=1e-4)


@pytest.mark.parametrize('responses', [50, 64])
def test_a_step_that_would_end_the_kl_coefficient_is_refused(responses: int):
  with pytest.raises(ValueError, match='horizon=10 must be above'):
    rewards.adapted_kl_coef(
        jnp.float32(1),
        jnp.float32(0),
        target=6.0,
        horizon=10,
        responses=responses,
    )
