"""Policy, value and SFT losses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.objective import losses

# Two tokens, three tokens, none.
MASK = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
LOG = math.log
# Ratios 1.5, .9; .5, 2, 1.
LOGPROBS = np.array(
    [[LOG(1.5) - 1, LOG(0.9) - 2, 9], [LOG(0.5), LOG(2) - 3, -4], [9] * 3]
)
OLD = np.array([[-1.0, -2, 7], [0, -3, -4], [7] * 3])
ADVANTAGES = np.array([[2.0, -3, 5], [-4, -0.5, 3], [5] * 3])
loss_weights = jax.jit(losses.loss_weights, static_argnames='reduction')
policy_loss = jax.jit(losses.policy_loss, static_argnames='clip_eps')
explained_variance = jax.jit(losses.explained_variance)
value_loss = jax.jit(losses.value_loss, static_argnames='clip_eps')


def _weights(mask: np.ndarray = MASK, reduction: str = 'sequence'):
  return np.asarray(loss_weights(mask, reduction=reduction))


def _fill(x: np.ndarray, pad: float = math.nan) -> np.ndarray:
  return np.where(MASK, x, pad).astype(jnp.result_type(float))


def _policy(pad: float = math.nan, order=(0, 1, 2), reduction='sequence'):
  order = np.array(order)
  arrays = (_fill(x, pad)[order] for x in (LOGPROBS, OLD, ADVANTAGES))
  weights = _weights(reduction=reduction)[order]
  return policy_loss(*arrays, weights, MASK[order], clip_eps=0.2)


def _cost(logprobs, old_logprobs, advantages, weights, mask):
  return losses.policy_loss(
      logprobs, old_logprobs, advantages, weights, mask, clip_eps=0.2
  )[0]


policy_grad = jax.jit(jax.grad(_cost))


def _policy_grad(logprobs: np.ndarray) -> jax.Array:
  """Gradient of the policy loss; padding holds nan."""
  arrays = (_fill(x) for x in (logprobs, OLD, ADVANTAGES))
  return policy_grad(*arrays, _weights(), MASK)


def test_weights_of_both_reductions():
  # Two rows have tokens: 1/(2 * 2) and 1/(3 * 2); five tokens.
  np.testing.assert_allclose(
      _weights(), [[1 / 4, 1 / 4, 0], [1 / 6] * 3, [0] * 3], rtol=1e-6
  )
  np.testing.assert_allclose(
      _weights(reduction='token'), [[0.2, 0.2, 0], [0.2] * 3, [0] * 3]
  )


@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_weights_without_tokens_are_zero(reduction: str):
  got = _weights(np.zeros((2, 3), bool), reduction)
  assert got.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_policy_loss_by_hand():
  # max(-A ratio, -A clip(ratio, .8, 1.2)):
  #   A 2    ratio 1.5  max(-3, -2.4)   = -2.4  clipped, no gradient
  #   A -3   ratio .9   2.7
  #   A -4   ratio .5   max(2, 3.2)     = 3.2   clipped, no gradient
  #   A -.5  ratio 2    max(1, .6)      = 1
  #   A 3    ratio 1    -3
  # Sequences: (-2.4 + 2.7) / 2 = .15, (3.2 + 1 - 3) / 3 = .4; mean .275
  loss, metrics = _policy()
  np.testing.assert_allclose(loss, 0.275, rtol=1e-5)
  # Outside: 1.5; .5 and 2. (1/2 + 2/3) / 2; ratios (2.4/2 + 3.5/3) / 2
  np.testing.assert_allclose(metrics['clipfrac'], 7 / 12, rtol=1e-5)
  np.testing.assert_allclose(metrics['ratio'], (1.2 + 3.5 / 3) / 2, rtol=1e-5)
  kl = lambda r: r - 1 - LOG(r)
  want = (kl(1.5) + kl(0.9)) / 4 + (kl(0.5) + kl(2)) / 6
  np.testing.assert_allclose(metrics['approxkl'], want, rtol=1e-5)
  # Tokens: (-2.4 + 2.7 + 3.2 + 1 - 3) / 5
  np.testing.assert_allclose(_policy(reduction='token')[0], 0.3, rtol=1e-5)


def test_policy_gradient_by_hand():
  # weight * -A * ratio where unclipped.
  np.testing.assert_allclose(
      _policy_grad(LOGPROBS),
      [[0, 2.7 / 4, 0], [0, 1 / 6, -3 / 6], [0, 0, 0]],
      rtol=1e-5,
  )


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
  np.testing.assert_allclose(
      _policy_grad(OLD),
      np.where(MASK, -ADVANTAGES * _weights(), 0),
      rtol=1e-6,
  )


@pytest.mark.parametrize('gap', [-800.0, 800.0])
def test_huge_log_ratios_stay_finite(gap: float):
  mask = jnp.ones((1, 1), bool)
  weights, one = jnp.ones((1, 1)), jnp.ones((1, 1))

  def cost(logprobs):
    return losses.policy_loss(
        logprobs, logprobs * 0 - gap, -one, weights, mask, clip_eps=0.2
    )

  run = jax.jit(jax.value_and_grad(cost, has_aux=True))
  (loss, metrics), grad = run(0 * one)
  assert all(np.isfinite(x).all() for x in (loss, grad, *metrics.values()))


# Old values, values, returns; clip .5.
OLD_VALUES = np.array([[1.0, 2, 9], [3, 1, -1], [9] * 3])
VALUES = np.array([[1.25, 4, 9], [1, 0.75, -3], [9] * 3])
RETURNS = np.array([[2.25, 5, 9], [0, 1, -2], [9] * 3])


def _value(pad: float = math.nan, order=(0, 1, 2), clip_eps: float = 0.5):
  order = np.array(order)
  arrays = (_fill(x, pad)[order] for x in (VALUES, OLD_VALUES, RETURNS))
  weights, mask = _weights()[order], MASK[order]
  return value_loss(*arrays, weights, mask, clip_eps=clip_eps)


def test_value_loss_by_hand():
  # V 1.25 inside        1 and 1
  # V 4 -> 2.5, R 5      1 and 6.25, clipped error larger
  # V 1 -> 2.5, R 0      1 and 6.25, clipped error larger
  # V .75 inside, R 1    .0625
  # V -3 -> -1.5, R -2   1 and .25
  # .5 * (7.25/4 + 7.3125/6)
  loss, metrics = _value()
  np.testing.assert_allclose(loss, 0.5 * (7.25 / 4 + 7.3125 / 6), rtol=1e-6)
  np.testing.assert_allclose(metrics['clipfrac'], 1 / 4 + 1 / 6, rtol=1e-6)


def test_value_loss_without_clipping_is_half_the_squared_error():
  loss, metrics = _value(clip_eps=0.0)
  # .5 * ((1 + 1)/4 + (1 + .0625 + 1)/6)
  np.testing.assert_allclose(loss, 0.5 * (2 / 4 + 2.0625 / 6), rtol=1e-6)
  assert float(metrics['clipfrac']) == 0


def test_value_gradient_by_hand():
  weights = _weights()

  def cost(values):
    return losses.value_loss(
        values,
        _fill(OLD_VALUES),
        _fill(RETURNS),
        weights,
        MASK,
        clip_eps=0.5,
    )[0]

  # weight * (V - R) where the unclipped error is the larger, or both equal.
  np.testing.assert_allclose(
      jax.jit(jax.grad(cost))(_fill(VALUES)),
      [[-1 / 4, 0, 0], [0, -0.25 / 6, -1 / 6], [0, 0, 0]],
      rtol=1e-6,
  )


@pytest.mark.parametrize('loss', [_policy, _value])
def test_padding_row_order_and_jit_change_nothing(loss):
  base, metrics = loss()
  with jax.disable_jit():
    plain, _ = loss()
  results = [plain, loss(pad=-800.0)[0], loss(order=(2, 1, 0))[0]]
  np.testing.assert_allclose(results, [base] * 3, rtol=1e-6)
  moved = loss(order=(2, 1, 0))[1]
  for name, value in metrics.items():
    np.testing.assert_allclose(moved[name], value, rtol=1e-6)


def test_micro_batches_add_up_to_the_batch():
  rng = np.random.default_rng(0)
  mask = np.arange(7)[None] < np.array([3, 7, 0, 1, 5, 2])[:, None]
  run = jax.jit(jax.value_and_grad(_cost))
  with jax.enable_x64(True):
    for reduction in losses.REDUCTIONS:
      weights = _weights(mask, reduction)
      batch = (*rng.normal(size=(3, 6, 7)), weights, mask)
      whole, grad = run(*batch)
      parts = [run(*(x[s : s + 2] for x in batch)) for s in (0, 2, 4)]
      total = sum(float(loss) for loss, _ in parts)
      np.testing.assert_allclose(total, whole, rtol=0, atol=1e-15)
      np.testing.assert_allclose(
          np.concatenate([grad for _, grad in parts]), grad, atol=1e-15
      )


def test_float64_stays_float64():
  with jax.enable_x64(True):
    assert _policy()[0].dtype == _value()[0].dtype == jnp.float64
    np.testing.assert_allclose(_policy()[0], 0.275, rtol=0, atol=1e-14)


def test_explained_variance_by_hand():
  # Returns 1 2 3 6: mean 3, variance (4 + 1 + 0 + 9)/4 = 3.5. Errors
  # 0 1 0 1: variance .25. 1 - .25/3.5
  mask = np.array([[True, True, True], [True, False, False]])
  returns = np.array([[1, 2, 3], [6, math.nan, math.nan]])
  values = np.array([[1, 1, 3], [5, math.nan, math.nan]])
  got = explained_variance(values, returns, mask)
  np.testing.assert_allclose(got, 1 - 0.25 / 3.5, rtol=1e-6)
  assert float(explained_variance(returns, returns, mask)) == 1
  constant = np.where(mask, 5.0, math.nan)
  assert float(explained_variance(values, constant, mask)) == 0


def test_sft_loss_by_hand():
  logprobs = _fill(np.array([[-1.0, -2, 9], [-3, -4, -5], [9] * 3]))
  # (1.5 + 4) / 2; 15 / 5
  loss, grad = jax.jit(jax.value_and_grad(losses.sft_loss))(
      logprobs, _weights()
  )
  np.testing.assert_allclose(loss, 2.75, rtol=1e-6)
  np.testing.assert_array_equal(grad, -_weights())
  token = jax.jit(losses.sft_loss)(logprobs, _weights(reduction='token'))
  np.testing.assert_allclose(token, 3.0, rtol=1e-6)
