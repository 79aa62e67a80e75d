"""Losses of policy, critic and supervised fine-tuning.

A loss is a sum over tokens weighted by `loss_weights` of the whole batch, so
the losses and gradients of micro-batches add up to those of the batch.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.objective.rewards import bounded, log_ratio
from ma_rlhf_jax.structs import Array


def _per_sequence(mask_BT: Array) -> Array:
  """1 / (tokens of the row * rows that have a token)."""
  tokens_B = jnp.sum(mask_BT, axis=1, dtype=jnp.result_type(float))
  rows = jnp.sum(tokens_B > 0, dtype=tokens_B.dtype)
  return 1 / jnp.maximum(tokens_B * rows, 1)[:, None]


def _per_token(mask_BT: Array) -> Array:
  """1 / tokens of the batch."""
  tokens = jnp.sum(mask_BT, dtype=jnp.result_type(float))
  return 1 / jnp.maximum(tokens, 1)


REDUCTIONS: dict[str, Callable[[Array], Array]] = {
    'sequence': _per_sequence,
    'token': _per_token,
}


def loss_weights(mask_BT: Array, *, reduction: str) -> Array:
  """What each token counts in a loss; the weights add up to 1.

  Args:
    mask_BT: bool, true on tokens that count, of the whole batch over which one
      optimizer update is taken. Cut the result into micro-batches, not this.
    reduction: `sequence`: the mean over rows of the mean over a row's tokens,
      rows without a token left out; `token`: the mean over all tokens.

  Returns:
    float [B, T], 0 on padding; all 0 where there is no token at all.
  """
  chex.assert_rank(mask_BT, 2)
  chex.assert_type(mask_BT, bool)
  return jnp.where(mask_BT, REDUCTIONS[reduction](mask_BT), 0)


def policy_loss(
    logprobs_BT: Array,
    old_logprobs_BT: Array,
    advantages_BT: Array,
    weights_BT: Array,
    mask_BT: Array,
    *,
    clip_eps: float,
) -> tuple[Array, dict[str, Array]]:
  """The clipped surrogate of PPO, to be minimised.

  sum_t weights_t max(-A_t ratio_t, -A_t clip(ratio_t, 1 - eps, 1 + eps))
  with ratio = exp(logprobs - old_logprobs), the exponent within +-20.

  Args:
    logprobs_BT: float, nats, under the policy that learns.
    old_logprobs_BT: float, nats, under the policy that sampled.
    advantages_BT: float, reward-model units.
    weights_BT: float, from `loss_weights`.
    mask_BT: bool, true on real response tokens; the rest may hold anything.
    clip_eps: > 0, largest rewarded deviation of the ratio from 1.

  Returns:
    loss: scalar.
    metrics: weighted sums over tokens: `clipfrac`, tokens whose ratio lies
      outside the clip range; `approxkl`, nats, (ratio - 1) - log ratio;
      `ratio`.

  Source: arXiv 1707.06347, equation 7; the ratio is per token as in the
  authors' code of arXiv 2410.02743.
  """
  chex.assert_rank(mask_BT, 2)
  chex.assert_equal_shape([logprobs_BT, advantages_BT, weights_BT, mask_BT])
  log_ratio_BT = bounded(log_ratio(logprobs_BT, old_logprobs_BT, mask_BT))
  ratio_BT = jnp.exp(log_ratio_BT)
  advantages_BT = jnp.where(mask_BT, advantages_BT, 0)
  clipped_BT = jnp.clip(ratio_BT, 1 - clip_eps, 1 + clip_eps)
  loss_BT = jnp.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)

  def total(x_BT: Array) -> Array:
    return masking.masked_sum(weights_BT * x_BT, mask_BT)

  metrics = {
      'clipfrac': total(jnp.abs(ratio_BT - 1) > clip_eps),
      'approxkl': total(jnp.expm1(log_ratio_BT) - log_ratio_BT),
      'ratio': total(ratio_BT),
  }
  return total(loss_BT), metrics


def value_loss(
    values_BT: Array,
    old_values_BT: Array,
    returns_BT: Array,
    weights_BT: Array,
    mask_BT: Array,
    *,
    clip_eps: float,
) -> tuple[Array, dict[str, Array]]:
  """Half the squared error of the critic, clipped around its old values.

  sum_t weights_t 0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)

  Args:
    values_BT: float, reward-model units, of the critic that learns.
    old_values_BT: float, reward-model units, from before the update.
    returns_BT: float, reward-model units.
    weights_BT: float, from `loss_weights` of the same mask.
    mask_BT: bool, true on tokens that count; the rest may hold anything.
    clip_eps: reward-model units; 0 = no clipping.

  Returns:
    loss: scalar.
    metrics: `clipfrac`, weighted sum of tokens at which the clipped error is
      the larger one.

  Source: the authors' code of arXiv 2410.02743, after DeepSpeed-Chat.
  """
  chex.assert_rank(mask_BT, 2)
  chex.assert_equal_shape([values_BT, old_values_BT, returns_BT, mask_BT])
  chex.assert_equal_shape([weights_BT, mask_BT])
  dtype = masking.wide(jnp.result_type(values_BT, old_values_BT, returns_BT))
  clean = lambda x_BT: jnp.where(mask_BT, x_BT, 0).astype(dtype)
  values_BT, returns_BT = clean(values_BT), clean(returns_BT)
  old_BT = clean(old_values_BT)
  error_BT = jnp.square(values_BT - returns_BT)
  clipped_error_BT = error_BT
  if clip_eps:
    clipped_BT = jnp.clip(values_BT, old_BT - clip_eps, old_BT + clip_eps)
    clipped_error_BT = jnp.square(clipped_BT - returns_BT)

  def total(x_BT: Array) -> Array:
    return masking.masked_sum(weights_BT * x_BT, mask_BT)

  metrics = {'clipfrac': total(clipped_error_BT > error_BT)}
  return 0.5 * total(jnp.maximum(error_BT, clipped_error_BT)), metrics


def explained_variance(
    values_BT: Array, returns_BT: Array, mask_BT: Array
) -> Array:
  """`1 - var(returns - values) / var(returns)`, 0 where returns are constant.

  1 is a perfect critic; below 0 it is worse than a constant.
  """
  chex.assert_equal_shape([values_BT, returns_BT, mask_BT])

  def variance(x_BT: Array) -> Array:
    mean = masking.masked_mean(x_BT, mask_BT)
    return masking.masked_mean(jnp.square(x_BT - mean), mask_BT)

  total = variance(returns_BT)
  unexplained = variance(returns_BT - values_BT)
  ratio = unexplained / jnp.where(total > 0, total, 1)
  return jnp.where(total > 0, 1 - ratio, 0)


def sft_loss(logprobs_BT: Array, weights_BT: Array) -> Array:
  """Weighted negative log-likelihood, nats per token.

  Args:
    logprobs_BT: float, nats; anything where the weight is 0.
    weights_BT: float, from `loss_weights` of the tokens to learn.
  """
  chex.assert_rank(weights_BT, 2)
  chex.assert_equal_shape([logprobs_BT, weights_BT])
  mask_BT = weights_BT > 0
  return -masking.masked_sum(weights_BT * logprobs_BT, mask_BT)
