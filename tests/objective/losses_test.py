"""Policy, value and SFT losses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import losses
from ma_rlhf_jax.structs import LossWeights, MacroActions

# Two tokens, three tokens, none.
MASK = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
LOG = math.log
# Macro actions of 2 tokens; 2 and 1.
STARTS = np.array([[1, 0, 0], [1, 0, 1], [0, 0, 0]], bool)
# Ratios 1.5, .9; .5, 2, 1.
LOGPROBS = np.array(
    [[LOG(1.5) - 1, LOG(0.9) - 2, 9], [LOG(0.5), LOG(2) - 3, -4], [9] * 3]
)
OLD = np.array([[-1.0, -2, 7], [0, -3, -4], [7] * 3])
ADVANTAGES = np.array([[2.0, -3, 5], [-4, -0.5, 3], [5] * 3])
loss_weights = jax.jit(losses.loss_weights, static_argnames='reduction')
macro_actions = jax.jit(termination.macro_actions)
policy_loss = jax.jit(losses.policy_loss, static_argnames=('clip_eps', 'ratio'))
explained_variance = jax.jit(losses.explained_variance)
value_loss = jax.jit(losses.value_loss, static_argnames='clip_eps')


def _weights(
    mask: np.ndarray = MASK,
    reduction: str = 'sequence',
    starts: np.ndarray = STARTS,
) -> LossWeights:
  return jax.device_get(loss_weights(mask, starts, reduction=reduction))


def _take(x: LossWeights, order: np.ndarray) -> LossWeights:
  return jax.tree.map(lambda a: a[order], x)


def _macro(order: np.ndarray | slice = slice(None)) -> MacroActions:
  return jax.device_get(macro_actions(STARTS[order], MASK[order]))


def _fill(x: np.ndarray, pad: float = math.nan) -> np.ndarray:
  return np.where(MASK, x, pad).astype(jnp.result_type(float))


def _policy(
    pad: float = math.nan,
    order=(0, 1, 2),
    reduction='sequence',
    ratio='token',
):
  order = np.array(order)
  arrays = (_fill(x, pad)[order] for x in (LOGPROBS, OLD, ADVANTAGES))
  weights = _take(_weights(reduction=reduction), order)
  return policy_loss(*arrays, weights, _macro(order), clip_eps=0.2, ratio=ratio)


def _cost(logprobs, old_logprobs, advantages, weights, macro, ratio):
  return losses.policy_loss(
      logprobs,
      old_logprobs,
      advantages,
      weights,
      macro,
      clip_eps=0.2,
      ratio=ratio,
  )[0]


policy_grad = jax.jit(jax.grad(_cost), static_argnames='ratio')


def _policy_grad(
    logprobs: np.ndarray,
    advantages: np.ndarray = ADVANTAGES,
    reduction: str = 'sequence',
    ratio: str = 'token',
) -> jax.Array:
  """Gradient of the policy loss; padding holds nan."""
  arrays = (_fill(x) for x in (logprobs, OLD, advantages))
  weights = _weights(reduction=reduction)
  return policy_grad(*arrays, weights, _macro(), ratio=ratio)


@pytest.mark.parametrize(
    ('reduction', 'rows'),
    [
        ('sequence', (1 / 4, 1 / 6)),  # two rows have tokens: 2 * 2, 3 * 2
        ('token', (1 / 5, 1 / 5)),
        ('macro', (1 / 3, 1 / 3)),  # three macro actions
        ('constant', (1 / 9, 1 / 9)),  # three rows of three columns
    ],
)
def test_weights_of_every_reduction(reduction: str, rows: tuple[float, ...]):
  a, b = rows
  got = _weights(reduction=reduction)
  np.testing.assert_allclose(
      got.loss_BT, [[a, a, 0], [b, b, b], [0] * 3], rtol=1e-6
  )
  np.testing.assert_allclose(
      got.metric_BT, [[0.2, 0.2, 0], [0.2] * 3, [0] * 3], rtol=1e-6
  )
  tokens = jax.jit(losses.token_weights)(MASK)
  np.testing.assert_array_equal(tokens, got.metric_BT)


@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_weights_without_tokens_are_zero(reduction: str):
  got = _weights(np.zeros((3, 3), bool), reduction, np.zeros((3, 3), bool))
  assert got.loss_BT.tolist() == got.metric_BT.tolist() == [[0, 0, 0]] * 3


# One advantage for each macro action: 2; -4 and 3.
SHARED = np.array([[2.0, 2, 5], [-4, -4, 3], [5] * 3])


def test_macro_ratios_by_hand():
  # Products 1.5 * .9 = 1.35; .5 * 2 = 1; 1. Each macro action counts once.
  #   A 2   max(-2.7, -2.4) = -2.4, clipped;  A -4: 4;  A 3: -3
  # Sequences: -2.4/4 + (4 - 3)/6
  weights = _weights()
  arrays = (_fill(x) for x in (LOGPROBS, OLD, SHARED))
  loss, metrics = policy_loss(
      *arrays, weights, _macro(), clip_eps=0.2, ratio='macro'
  )
  np.testing.assert_allclose(loss, -0.6 + 1 / 6, rtol=1e-5)
  # Of five tokens two are in a clipped macro action.
  np.testing.assert_allclose(metrics['clipfrac'], 0.4, rtol=1e-5)
  np.testing.assert_allclose(metrics['ratio'], (2.7 + 3) / 5, rtol=1e-5)
  # Unclipped, the gradient of a product is the product, at each token of it:
  # 4/6 twice, -3/6.
  np.testing.assert_allclose(
      _policy_grad(LOGPROBS, SHARED, ratio='macro'),
      [[0, 0, 0], [4 / 6, 4 / 6, -0.5], [0, 0, 0]],
      rtol=1e-5,
  )


def test_geometric_ratios_by_hand():
  # sqrt(1.35) = 1.161895, inside; 1; 1. Each token counts.
  # -2 * 1.161895 * 2/4 + (4 * 2 - 3)/6
  weights, root = _weights(), math.sqrt(1.35)
  arrays = (_fill(x) for x in (LOGPROBS, OLD, SHARED))
  loss, metrics = policy_loss(
      *arrays, weights, _macro(), clip_eps=0.2, ratio='geometric'
  )
  np.testing.assert_allclose(loss, -root + 5 / 6, rtol=1e-5)
  assert metrics['clipfrac'] == 0
  # Half the gradient from each of two tokens.
  np.testing.assert_allclose(
      _policy_grad(LOGPROBS, SHARED, ratio='geometric'),
      [[-root / 2, -root / 2, 0], [4 / 6, 4 / 6, -0.5], [0, 0, 0]],
      rtol=1e-5,
  )


@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
@pytest.mark.parametrize('ratio', losses.RATIOS)
def test_before_an_update_all_ratios_have_one_gradient(
    ratio: str, reduction: str
):
  want = -SHARED * _weights(reduction=reduction).loss_BT
  np.testing.assert_allclose(
      _policy_grad(OLD, SHARED, reduction, ratio),
      np.where(MASK, want, 0),
      rtol=1e-6,
  )


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
  # Outside: 1.5; .5 and 2, of five; ratios 2.4 + 3.5
  np.testing.assert_allclose(metrics['clipfrac'], 3 / 5, rtol=1e-5)
  np.testing.assert_allclose(metrics['ratio'], 5.9 / 5, rtol=1e-5)
  kl = lambda r: r - 1 - LOG(r)
  want = (kl(1.5) + kl(0.9) + kl(0.5) + kl(2)) / 5
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
      np.where(MASK, -ADVANTAGES * _weights().loss_BT, 0),
      rtol=1e-6,
  )


@pytest.mark.parametrize('gap', [-800.0, 800.0])
def test_huge_log_ratios_stay_finite(gap: float):
  mask, one = jnp.ones((1, 1), bool), jnp.ones((1, 1))
  weights = LossWeights(loss_BT=one, metric_BT=one)
  macro = termination.macro_actions(mask, mask)

  def cost(logprobs):
    return losses.policy_loss(
        logprobs, logprobs * 0 - gap, -one, weights, macro, clip_eps=0.2
    )

  run = jax.jit(jax.value_and_grad(cost, has_aux=True))
  (loss, metrics), grad = run(0 * one)
  assert all(np.isfinite(x).all() for x in (loss, grad, *metrics.values()))


def test_clamped_tokens_are_counted_where_the_gradient_is_lost():
  # Log-ratios 21 19 21 -21 | 12 9, advantages - - + - | - -.
  gaps = jnp.array([[21.0, 19, 21, -21, 12, 9]])
  advantages = jnp.array([[-1.0, -1, 1, -1, -1, -1]])
  mask = jnp.ones((1, 6), bool)
  macro = termination.macro_actions(jnp.array([[True] * 5 + [False]]), mask)
  weights = losses.loss_weights(mask, macro.starts_BT, reduction='token')
  metrics, grads = {}, {}
  for ratio in ('token', 'macro'):
    cost = lambda x, ratio=ratio: losses.policy_loss(
        x, 0 * x, advantages, weights, macro, clip_eps=0.2, ratio=ratio
    )
    grads[ratio], metrics[ratio] = jax.grad(cost, has_aux=True)(gaps)
  # The first. The second still falls, the third is clipped as it should be, the
  # fourth is e^-21 of what it was.
  np.testing.assert_allclose(metrics['token']['clamped'], 1 / 6, rtol=1e-6)
  np.testing.assert_array_equal(grads['token'][0, [0, 2]], [0, 0])
  assert grads['token'][0, 1] > 0
  # And both tokens of the last macro action: 12 + 9 = 21.
  np.testing.assert_allclose(metrics['macro']['clamped'], 3 / 6, rtol=1e-6)
  np.testing.assert_array_equal(grads['macro'][0, 4:], [0, 0])


@pytest.mark.parametrize(
    ('reduction', 'weight'),
    [('sequence', 1), ('token', 1), ('macro', 5 / 3), ('constant', 5 / 9)],
)
def test_a_loss_over_its_weight_is_a_mean(reduction: str, weight: float):
  weights = _weights(reduction=reduction)
  zeros = np.zeros(MASK.shape)
  # Errors of 3 everywhere: half of nine.
  loss, found = value_loss(zeros + 3, zeros, zeros, weights, MASK, clip_eps=0.0)
  np.testing.assert_allclose(found['weight'], weight, rtol=1e-6)
  np.testing.assert_allclose(loss / found['weight'], 4.5, rtol=1e-6)
  # Advantages of 3 at ratio 1.
  for ratio in losses.RATIOS:
    loss, found = policy_loss(
        zeros, zeros, zeros + 3, weights, _macro(), clip_eps=0.2, ratio=ratio
    )
    np.testing.assert_allclose(loss / found['weight'], -3, rtol=1e-6)


# Old values, values, returns; clip .5.
OLD_VALUES = np.array([[1.0, 2, 9], [3, 1, -1], [9] * 3])
VALUES = np.array([[1.25, 4, 9], [1, 0.75, -3], [9] * 3])
RETURNS = np.array([[2.25, 5, 9], [0, 1, -2], [9] * 3])


def _value(pad: float = math.nan, order=(0, 1, 2), clip_eps: float = 0.5):
  order = np.array(order)
  arrays = (_fill(x, pad)[order] for x in (VALUES, OLD_VALUES, RETURNS))
  weights, mask = _take(_weights(), order), MASK[order]
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
  np.testing.assert_allclose(metrics['clipfrac'], 2 / 5, rtol=1e-6)


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
  # 1e-5 are 168 roundings; six tokens take some ten each.
  np.testing.assert_allclose(results, [base] * 3, rtol=1e-5)
  moved = loss(order=(2, 1, 0))[1]
  for name, value in metrics.items():
    np.testing.assert_allclose(moved[name], value, rtol=1e-5)


@pytest.mark.parametrize('ratio', losses.RATIOS)
def test_micro_batches_add_up_to_the_batch(ratio: str):
  rng = np.random.default_rng(0)
  mask = np.arange(7)[None] < np.array([3, 7, 0, 1, 5, 2])[:, None]
  run = jax.jit(jax.value_and_grad(_cost), static_argnames='ratio')
  with jax.enable_x64(True):
    macro = macro_actions(jnp.asarray(rng.random((6, 7)) < 0.4), mask)
    for reduction in losses.REDUCTIONS:
      weights = _weights(mask, reduction, np.asarray(macro.starts_BT))
      batch = (*rng.normal(size=(3, 6, 7)), weights, macro)
      whole, grad = run(*batch, ratio=ratio)
      part = lambda first, batch=batch: jax.tree.map(
          lambda x: x[first : first + 2], batch
      )
      parts = [run(*part(first), ratio=ratio) for first in (0, 2, 4)]
      total = sum(float(loss) for loss, _ in parts)
      np.testing.assert_allclose(total, whole, rtol=0, atol=1e-14)
      np.testing.assert_allclose(
          np.concatenate([grad for _, grad in parts]), grad, atol=1e-14
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


def test_a_spread_that_may_be_rounding_is_none():
  # 3.3 up to one unit in the last place (2.4e-7), as sums of rewards are.
  mask = np.ones((8, 16), bool)
  returns = np.full((8, 16), 3.3, np.float32)
  returns[:, ::2] = np.nextafter(returns[:, ::2], np.float32(4))
  values = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
  assert float(explained_variance(values, returns, mask)) == 0
  # A spread of a thousandth is one: values 3.3 explain nothing of it, and
  # values that know half of it three quarters.
  returns = np.float32(3.3) + np.float32(1e-3) * values
  half = np.float32(3.3) + np.float32(5e-4) * values
  found = float(explained_variance(half, returns, mask))
  np.testing.assert_allclose(found, 0.75, atol=2e-3)
  constant = np.full((8, 16), 7.0, np.float32)
  np.testing.assert_allclose(
      explained_variance(constant, returns, mask), 0, atol=2e-3
  )


def test_sft_loss_by_hand():
  logprobs = _fill(np.array([[-1.0, -2, 9], [-3, -4, -5], [9] * 3]))
  # (1.5 + 4) / 2; 15 / 5
  loss, grad = jax.jit(jax.value_and_grad(losses.sft_loss))(
      logprobs, _weights().loss_BT
  )
  np.testing.assert_allclose(loss, 2.75, rtol=1e-6)
  np.testing.assert_array_equal(grad, -_weights().loss_BT)
  token = jax.jit(losses.sft_loss)(logprobs, losses.token_weights(MASK))
  np.testing.assert_allclose(token, 3.0, rtol=1e-6)
