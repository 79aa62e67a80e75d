"""Losses of policy, critic and supervised fine-tuning.

A loss is a sum over tokens weighted by `loss_weights` of the whole batch, so
the losses and gradients of micro-batches add up to those of the batch.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import aggregate
from ma_rlhf_jax.objective.rewards import MAX_LOG_RATIO, bounded, log_ratio
from ma_rlhf_jax.structs import Array, LossWeights, MacroActions


def _per_sequence(mask_BT: Array, starts_BT: Array) -> Array:
  """1 / (tokens of the row * rows that have a token)."""
  del starts_BT
  tokens_B = jnp.sum(mask_BT, axis=1, dtype=jnp.result_type(float))
  rows = jnp.sum(tokens_B > 0, dtype=tokens_B.dtype)
  return 1 / jnp.maximum(tokens_B * rows, 1)[:, None]


def _per_token(mask_BT: Array, starts_BT: Array) -> Array:
  """1 / tokens of the batch."""
  del starts_BT
  tokens = jnp.sum(mask_BT, dtype=jnp.result_type(float))
  return 1 / jnp.maximum(tokens, 1)


def _per_macro(mask_BT: Array, starts_BT: Array) -> Array:
  """1 / macro actions of the batch."""
  return _per_token(starts_BT & mask_BT, starts_BT)


def _constant(mask_BT: Array, starts_BT: Array) -> Array:
  """1 / (B T)."""
  del starts_BT
  return jnp.full((), 1 / mask_BT.size, jnp.result_type(float))


REDUCTIONS: dict[str, Callable[[Array, Array], Array]] = {
    'sequence': _per_sequence,  # authors
    'token': _per_token,
    'macro': _per_macro,  # paper
    'constant': _constant,
}


def loss_weights(
    mask_BT: Array, starts_BT: Array | None, *, reduction: str
) -> LossWeights:
  """What each token counts in a loss, and in the metrics beside it.

  Args:
    mask_BT: bool, true on tokens that count, of the whole batch over which one
      optimizer update is taken. Cut the result into micro-batches, not this.
    starts_BT: bool, true where a macro action opens; None where they are not
      known yet, which `macro` does not allow.
    reduction: the sum over tokens is divided by
      `sequence`: the tokens of the row, then the mean over rows is taken, rows
      without a token left out;
      `token`: the tokens of the batch;
      `macro`: the macro actions of the batch;
      `constant`: B T, all columns. The only one whose expected gradient is that
      of the expected reward: dividing by the length of a response, which the
      policy chooses, turns whatever is wrong with the baseline into a
      preference for longer or shorter responses.

  Returns:
    Weights [B, T], 0 on padding; all 0 where there is no token at all. In the
    metrics each token counts the same.
  """
  chex.assert_rank(mask_BT, 2)
  known = [mask_BT] if starts_BT is None else [mask_BT, starts_BT]
  chex.assert_type(known, bool)
  chex.assert_equal_shape(known)
  only_tokens = lambda x: jnp.where(mask_BT, x, 0)
  return LossWeights(
      loss_BT=only_tokens(REDUCTIONS[reduction](mask_BT, starts_BT)),
      metric_BT=token_weights(mask_BT),
  )


def _token_log_ratio(log_ratio_BT: Array, macro: MacroActions) -> Array:
  del macro
  return log_ratio_BT


def _macro_log_ratio(log_ratio_BT: Array, macro: MacroActions) -> Array:
  summed_BM = aggregate.pool(log_ratio_BT, macro, weights='sum')
  return aggregate.spread(summed_BM, macro)


def _geometric_log_ratio(log_ratio_BT: Array, macro: MacroActions) -> Array:
  mean_BM = aggregate.pool(log_ratio_BT, macro, weights='mean')
  return aggregate.spread(mean_BM, macro)


# Name of config.ppo.ratio -> the log-ratio that stands at each token, [B, T].
RATIOS: dict[str, Callable[[Array, MacroActions], Array]] = {
    'token': _token_log_ratio,  # authors
    'macro': _macro_log_ratio,  # paper: the product over the macro action
    'geometric': _geometric_log_ratio,  # GSPO's, on a macro action
}


def policy_loss(
    logprobs_BT: Array,
    old_logprobs_BT: Array,
    advantages_BT: Array,
    weights: LossWeights,
    macro: MacroActions,
    *,
    clip_eps: float,
    ratio: str = 'token',
) -> tuple[Array, dict[str, Array]]:
  """The clipped surrogate of PPO, to be minimised.

  sum weights max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)), the ratio being

  `token`:     exp(logprobs - old_logprobs), summed over tokens
  `macro`:     its product over the macro action, summed over macro actions
  `geometric`: the geometric mean over the macro action, summed over tokens

  with log-ratios within +-20. Where nothing has been updated yet, all three
  have the same gradient: `weights * A * grad(logprobs)` at each token. Beyond
  +20 a token of negative advantage has no gradient, though its probability
  should fall: `clamped` counts such tokens.

  Args:
    logprobs_BT: float, nats, under the policy that learns.
    old_logprobs_BT: float, nats, under the policy that sampled.
    advantages_BT: float, reward-model units; one for each macro action where
      the ratio is.
    weights: of `loss_weights`.
    macro: the macro actions; what padding holds does not matter.
    clip_eps: > 0, largest rewarded deviation of the ratio from 1.
    ratio: a key of `RATIOS`.

  Returns:
    loss: scalar.
    metrics: means over tokens, as sums with `weights.metric_BT`: `clipfrac`,
      tokens whose ratio lies outside the clip range; `clamped`, tokens of
      negative advantage whose log-ratio is above +20; `approxkl`, nats per
      token, (ratio - 1) - log ratio of the token; `ratio`. And `weight`, what
      all that is summed in the loss weighs: loss / weight is a mean.

  Source: arXiv 1707.06347, equation 7; arXiv 2410.02743, equations 3 and 4, for
  `macro`, arXiv 2507.18071 for `geometric`; the authors' code has `token`.
  """
  mask_BT = macro.mask_BT
  chex.assert_rank(mask_BT, 2)
  chex.assert_equal_shape([logprobs_BT, advantages_BT, mask_BT])
  chex.assert_equal_shape([weights.loss_BT, weights.metric_BT, mask_BT])
  token_BT = log_ratio(logprobs_BT, old_logprobs_BT, mask_BT)
  free_BT = RATIOS[ratio](token_BT, macro)
  log_ratio_BT = bounded(free_BT)
  ratio_BT = jnp.exp(log_ratio_BT)
  advantages_BT = jnp.where(mask_BT, advantages_BT, 0)
  clipped_BT = jnp.clip(ratio_BT, 1 - clip_eps, 1 + clip_eps)
  loss_BT = jnp.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)
  counted_BT = macro.starts_BT if ratio == 'macro' else mask_BT
  loss = masking.masked_sum(weights.loss_BT * loss_BT, counted_BT)

  def mean(x_BT: Array) -> Array:
    return masking.masked_sum(weights.metric_BT * x_BT, mask_BT)

  token_BT = bounded(token_BT)
  return loss, {
      'clipfrac': mean(jnp.abs(ratio_BT - 1) > clip_eps),
      'clamped': mean((free_BT > MAX_LOG_RATIO) & (advantages_BT < 0)),
      'approxkl': mean(jnp.expm1(token_BT) - token_BT),
      'ratio': mean(ratio_BT),
      'weight': masking.masked_sum(weights.loss_BT, counted_BT),
  }


def value_loss(
    values_BT: Array,
    old_values_BT: Array,
    returns_BT: Array,
    weights: LossWeights,
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
    weights: of `loss_weights` with the same mask.
    mask_BT: bool, true on tokens that count; the rest may hold anything.
    clip_eps: reward-model units; 0 = no clipping.

  Returns:
    loss: scalar.
    metrics: `clipfrac`, the share of tokens at which the clipped error is the
      larger one, summed with `weights.metric_BT`; `weight`, what all that is
      summed in the loss weighs: loss / weight is a mean.

  Source: the authors' code of arXiv 2410.02743, after DeepSpeed-Chat.
  """
  chex.assert_rank(mask_BT, 2)
  chex.assert_equal_shape([values_BT, old_values_BT, returns_BT, mask_BT])
  chex.assert_equal_shape([weights.loss_BT, weights.metric_BT, mask_BT])
  dtype = masking.wide(jnp.result_type(values_BT, old_values_BT, returns_BT))
  clean = lambda x_BT: jnp.where(mask_BT, x_BT, 0).astype(dtype)
  values_BT, returns_BT = clean(values_BT), clean(returns_BT)
  old_BT = clean(old_values_BT)
  error_BT = jnp.square(values_BT - returns_BT)
  clipped_error_BT = error_BT
  if clip_eps:
    clipped_BT = jnp.clip(values_BT, old_BT - clip_eps, old_BT + clip_eps)
    clipped_error_BT = jnp.square(clipped_BT - returns_BT)

  total = lambda weights_BT, x_BT: masking.masked_sum(
      weights_BT * x_BT, mask_BT
  )
  worst_BT = jnp.maximum(error_BT, clipped_error_BT)
  clipped = total(weights.metric_BT, clipped_error_BT > error_BT)
  return 0.5 * total(weights.loss_BT, worst_BT), {
      'clipfrac': clipped,
      'weight': masking.masked_sum(weights.loss_BT, mask_BT),
  }


def explained_variance(
    values_BM: Array, returns_BM: Array, mask_BM: Array
) -> Array:
  """`1 - var(returns - values) / var(returns)`, 0 where returns are constant.

  1 is a critic that is right up to a constant (`critic/bias` tells that), 0 one
  as good as a constant, below 0 worse. Constant returns have no variance that
  could be explained, whatever the critic says, so that 0 is told of any. They
  count as constant where their spread may be rounding: a sum of M terms is
  wrong by up to M eps / 2 of its size.

  Args:
    values_BM: float, reward-model units.
    returns_BM: float, reward-model units, each a sum of at most M rewards.
    mask_BM: bool, true on what counts; the rest may hold anything.

  Returns:
    scalar, at most 1.
  """
  chex.assert_rank(mask_BM, 2)
  chex.assert_equal_shape([values_BM, returns_BM, mask_BM])

  def variance(x_BM: Array) -> Array:
    # The rounding of the first mean may exceed a small spread.
    for _ in range(2):
      x_BM = x_BM - masking.masked_mean(x_BM, mask_BM)
    return masking.masked_mean(jnp.square(x_BM), mask_BM)

  total = variance(returns_BM)
  size = masking.masked_mean(jnp.square(returns_BM), mask_BM)
  rounding = returns_BM.shape[1] * jnp.finfo(total.dtype).eps / 2
  varies = total > jnp.square(rounding) * size
  ratio = variance(returns_BM - values_BM) / jnp.where(varies, total, 1)
  return jnp.where(varies, 1 - ratio, 0)


def token_weights(mask_BT: Array) -> Array:
  """float [B, T]: 1 / tokens of the batch on each of them, 0 on the rest."""
  chex.assert_rank(mask_BT, 2)
  chex.assert_type(mask_BT, bool)
  return jnp.where(mask_BT, _per_token(mask_BT, mask_BT), 0)


def sft_loss(logprobs_BT: Array, weights_BT: Array) -> Array:
  """Weighted negative log-likelihood, nats per token.

  Args:
    logprobs_BT: float, nats; anything where the weight is 0.
    weights_BT: float, from `token_weights` of the tokens to learn.
  """
  chex.assert_rank(weights_BT, 2)
  chex.assert_equal_shape([logprobs_BT, weights_BT])
  mask_BT = weights_BT > 0
  return -masking.masked_sum(weights_BT * logprobs_BT, mask_BT)
