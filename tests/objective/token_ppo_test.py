"""One-token macro actions are token PPO, bit for bit.

`_token_ppo` is written anew and knows nothing of macro actions. Advantages,
returns and gradients have equal bits as XLA compiles for users, and with the
flags of the tests; the two losses are sums, whose order is the compiler's, so
they are equal but for rounding.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import losses, rewards, targets
from ma_rlhf_jax.structs import Array
from tests import tiny

VALUES = ('start', 'equal', 'unit', 'position', 'position_reversed')
CLIP_EPS, VALUE_CLIP, SCORE_CLIP = 0.2, 0.3, 2.5
NAMES = ('logprobs', 'ref', 'values', 'new_logprobs', 'new_values', 'score')
REDUCTIONS = ('sequence', 'token', 'macro', 'constant')


def _case(seed: int, rows: int, columns: int, dtype: str) -> dict:
  """Random rows; the first is full, others may be empty; padding is nan."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, columns + 1, size=rows)
  lengths[0] = columns
  mask = np.arange(columns)[None] < lengths[:, None]
  case = {}
  for name in NAMES:
    shape = (rows,) if name == 'score' else (rows, columns)
    x = 1.5 * rng.normal(size=shape)
    case[name] = x if name == 'score' else np.where(mask, x, np.nan)
  near = case['logprobs'] + 0.3 * rng.normal(size=mask.shape)
  case |= {'new_logprobs': near, 'mask': mask}
  return {k: v if v.dtype == bool else v.astype(dtype) for k, v in case.items()}


@functools.partial(
    jax.jit,
    static_argnames=('value', 'reduction', 'ratio', 'advantage', 'target'),
)
def _ours(
    case: dict,
    kl_coef: float,
    gamma: float,
    gae_lambda: float,
    *,
    value: str,
    reduction: str,
    ratio: str = 'token',
    advantage: str = 'shared',
    target: str = 'macro',
) -> dict[str, Array]:
  """The shipped functions with macro actions of one token."""
  mask = case['mask']
  keys = jax.random.split(jax.random.key(0), len(mask))
  macro = termination.segment(
      termination.TerminationInputs(mask, case['ref'], keys),
      termination.TerminationSettings('fixed', ngram=1),
  )
  token_rewards = rewards.token_rewards(
      case['logprobs'],
      case['ref'],
      case['score'],
      mask,
      kl_coef=kl_coef,
      score_clip=SCORE_CLIP,
  )
  made = targets.macro_targets(
      case['values'],
      token_rewards,
      macro,
      tiny.objective(
          gamma=gamma,
          gae_lambda=gae_lambda,
          critic_lambda=-1.0,
          discount='macro',
          pool_rewards='sum',
          pool_values=value,
          advantage=advantage,
          critic_target=target,
      ),
  )
  weights = losses.loss_weights(mask, macro.starts_BT, reduction=reduction)
  policy = lambda x: losses.policy_loss(
      x,
      case['logprobs'],
      made.advantages_BT,
      weights,
      macro,
      clip_eps=CLIP_EPS,
      ratio=ratio,
  )[0]
  critic = lambda x: losses.value_loss(
      x,
      case['values'],
      made.returns_BT,
      weights,
      mask,
      clip_eps=VALUE_CLIP,
  )[0]
  policy_loss, policy_grad = jax.value_and_grad(policy)(case['new_logprobs'])
  critic_loss, critic_grad = jax.value_and_grad(critic)(case['new_values'])
  return {
      'advantages': made.advantages_BT,
      'returns': made.returns_BT,
      'policy_loss': policy_loss,
      'critic_loss': critic_loss,
      'policy_grad': policy_grad,
      'critic_grad': critic_grad,
  }


def _token_weights(mask: Array, reduction: str) -> Array:
  tokens = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32)
  rows = jnp.sum(tokens > 0, dtype=jnp.float32)
  weight = {
      'sequence': 1 / jnp.maximum(tokens * rows, 1),
      'token': 1 / jnp.sum(tokens),
      'macro': 1 / jnp.sum(tokens),
      'constant': jnp.float32(1 / mask.size),
  }[reduction]
  return jnp.where(mask, weight, 0)


@functools.partial(jax.jit, static_argnames='reduction')
def _token_ppo(
    case: dict,
    kl_coef: float,
    gamma: float,
    gae_lambda: float,
    *,
    reduction: str,
) -> dict[str, Array]:
  """PPO over tokens as in arXiv 1707.06347."""
  mask = case['mask']
  c = {k: jnp.where(mask, x, 0) for k, x in case.items() if x.ndim == 2}
  score = jnp.clip(case['score'], -SCORE_CLIP, SCORE_CLIP)
  later = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
  reward = -kl_coef * (c['logprobs'] - c['ref'])
  reward += jnp.where(mask & ~later, score[:, None], 0)
  next_value = jnp.pad(c['values'][:, 1:], ((0, 0), (0, 1)))
  delta = reward + gamma * next_value - c['values']

  def step(carry: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
    delta, real = x
    carry = delta + gamma * gae_lambda * jnp.where(real, carry, 0)
    return carry, carry

  _, advantages = jax.lax.scan(
      step, jnp.zeros_like(score), (delta.T, mask.T), reverse=True
  )
  advantages = jnp.where(mask, advantages.T, 0)
  returns = advantages + c['values']
  weights = _token_weights(mask, reduction)

  def policy(logprobs: Array) -> Array:
    ratio = jnp.exp(jnp.where(mask, logprobs, 0) - c['logprobs'])
    clipped = jnp.clip(ratio, 1 - CLIP_EPS, 1 + CLIP_EPS)
    worst = jnp.maximum(-advantages * ratio, -advantages * clipped)
    return jnp.sum(jnp.where(mask, weights * worst, 0))

  def critic(values: Array) -> Array:
    values = jnp.where(mask, values, 0)
    old = c['values']
    clipped = jnp.clip(values, old - VALUE_CLIP, old + VALUE_CLIP)
    error = jnp.maximum(
        jnp.square(values - returns), jnp.square(clipped - returns)
    )
    return 0.5 * jnp.sum(jnp.where(mask, weights * error, 0))

  policy_loss, policy_grad = jax.value_and_grad(policy)(case['new_logprobs'])
  critic_loss, critic_grad = jax.value_and_grad(critic)(case['new_values'])
  return {
      'advantages': advantages,
      'returns': returns,
      'policy_loss': policy_loss,
      'critic_loss': critic_loss,
      'policy_grad': policy_grad,
      'critic_grad': critic_grad,
  }


@pytest.mark.parametrize(
    ('value', 'reduction'),
    [
        pytest.param(
            value,
            reduction,
            marks=()
            if 'start' == value or 'sequence' == reduction
            else pytest.mark.slow,
        )
        for value in VALUES
        for reduction in REDUCTIONS
    ],
)
def test_one_token_macros_are_token_ppo_bit_for_bit(value: str, reduction: str):
  # With `start` the targets of each token are the default.
  target = 'token' if value == 'start' else 'macro'
  settings = itertools.product((1.0, 0.97), (0.0, 0.95, 1.0))
  for seed, (gamma, gae_lambda) in enumerate(settings):
    for rows, columns in ((1, 9), (5, 14)):
      case = _case(seed, rows, columns, 'float32')
      how = np.float32(0.05), np.float32(gamma), np.float32(gae_lambda)
      got = _ours(case, *how, value=value, reduction=reduction, target=target)
      want = _token_ppo(case, *how, reduction=reduction)
      for name in want:
        assert got[name].dtype == jnp.float32
        # 70 terms at most are summed, of a few units in all.
        close = functools.partial(
            np.testing.assert_allclose, rtol=1e-6, atol=70 * 2.0**-24
        )
        same = close if 'loss' in name else np.testing.assert_array_equal
        same(got[name], want[name], err_msg=name)


@pytest.mark.parametrize(('gamma', 'gae_lambda'), [(1.0, 0.95), (0.97, 0.9)])
def test_bits_are_the_same_where_gamma_and_lambda_are_constants(
    gamma: float, gae_lambda: float
):
  # As in a run, whose programs hold the objective.
  case, kl_coef = _case(1, 5, 14, 'float32'), np.float32(0.05)
  ours = functools.partial(
      _ours, value='start', reduction='sequence', target='token'
  )
  got = jax.jit(lambda case: ours(case, kl_coef, gamma, gae_lambda))(case)
  how = kl_coef, np.float32(gamma), np.float32(gae_lambda)
  want = _token_ppo(case, *how, reduction='sequence')
  for name in ('advantages', 'returns', 'policy_grad', 'critic_grad'):
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_own_advantages_and_macro_ratios_change_nothing_either():
  case = _case(3, 6, 14, 'float32')
  how = 0.05, 1.0, 0.95
  want = _ours(case, *how, value='start', reduction='token')
  for change in ({'advantage': 'own'}, {'ratio': 'macro'}, {'target': 'token'}):
    got = _ours(case, *how, value='start', reduction='token', **change)
    for name in want:
      # Sums over 14 tokens: some sixty roundings of the largest number.
      bound = 64 * 2.0**-24 * np.abs(want[name]).max()
      np.testing.assert_allclose(got[name], want[name], rtol=0, atol=bound)


def _loop(
    case: dict, row: int, kl_coef: float, gamma: float, gae_lambda: float
) -> tuple[list[float], list[float]]:
  """Advantages and returns of a row, from its definition."""
  length = int(case['mask'][row].sum())
  x = {name: case[name][row].tolist() for name in ('logprobs', 'ref', 'values')}
  reward = [-kl_coef * (x['logprobs'][t] - x['ref'][t]) for t in range(length)]
  if length:
    reward[-1] += max(-SCORE_CLIP, min(SCORE_CLIP, float(case['score'][row])))
  values = [*x['values'][:length], 0.0]
  deltas = [
      reward[t] + gamma * values[t + 1] - values[t] for t in range(length)
  ]
  advantages = [
      math.fsum(
          (gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length)
      )
      for t in range(length)
  ]
  returns = [a + v for a, v in zip(advantages, values, strict=False)]
  return advantages, returns


@pytest.mark.parametrize('value', VALUES)
def test_one_token_macros_equal_a_plain_loop(value: str):
  with jax.enable_x64(True):
    for seed in range(6):
      case = _case(seed, 4, 11, 'float64')
      how = 0.07, (1.0, 0.9)[seed % 2], (0.95, 0.0, 1.0)[seed % 3]
      got = _ours(case, *how, value=value, reduction='sequence')
      rows = int(case['mask'].any(axis=1).sum())
      total = critic = 0.0
      grads = {name: np.zeros((4, 11)) for name in ('policy', 'critic')}
      for row in range(4):
        length = int(case['mask'][row].sum())
        advantages, returns = _loop(case, row, *how)
        for name, want in (('advantages', advantages), ('returns', returns)):
          np.testing.assert_allclose(
              got[name][row], [*want, *[0] * (11 - length)], rtol=0, atol=1e-12
          )
        for t in range(length):
          ratio = math.exp(
              case['new_logprobs'][row, t] - case['logprobs'][row, t]
          )
          clipped = max(1 - CLIP_EPS, min(1 + CLIP_EPS, ratio))
          a, weight = advantages[t], 1 / length / rows
          total += weight * max(-a * ratio, -a * clipped)
          # The ratio beyond the range is rewarded no further.
          if -a * ratio >= -a * clipped:
            grads['policy'][row, t] = -weight * a * ratio
          old, new = case['values'][row, t], case['new_values'][row, t]
          held = max(old - VALUE_CLIP, min(old + VALUE_CLIP, new))
          errors = new - returns[t], held - returns[t]
          critic += weight * max(e * e for e in errors) / 2
          if abs(errors[0]) >= abs(errors[1]):
            grads['critic'][row, t] = weight * errors[0]
      close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
      close(got['policy_loss'], total)
      close(got['critic_loss'], critic)
      for name, grad in grads.items():
        close(got[f'{name}_grad'], grad)
