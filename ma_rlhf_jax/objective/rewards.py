"""Token rewards: the KL penalty, and the score on the last token."""

import chex
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.structs import Array

# nats; exp(20) is finite in every dtype, and no useful ratio comes near it.
MAX_LOG_RATIO = 20.0

# The relative distance from its target beyond which a KL counts no more.
MAX_KL_ERROR = 0.2


def log_ratio(logprobs: Array, other_logprobs: Array, mask: Array) -> Array:
  """`logprobs - other_logprobs`, 0 on padding, at least float32."""
  chex.assert_equal_shape([logprobs, other_logprobs, mask])
  chex.assert_type(mask, bool)
  dtype = masking.wide(jnp.result_type(logprobs, other_logprobs))
  logprobs = jnp.where(mask, logprobs, 0).astype(dtype)
  return logprobs - jnp.where(mask, other_logprobs, 0).astype(dtype)


def bounded(log_ratio: Array) -> Array:
  """The log-ratio held within +-20 nats, so that its exp stays finite."""
  return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_rewards(
    logprobs_BT: Array,
    ref_logprobs_BT: Array,
    score_B: Array,
    mask_BT: Array,
    *,
    kl_coef: float | Array,
    score_clip: float,
    score_column_B: Array | None = None,
) -> Array:
  """`-kl_coef * (logprobs - ref_logprobs)`, plus the score on the last token.

  Args:
    logprobs_BT: float, nats, under the policy that sampled.
    ref_logprobs_BT: float, nats, under the reference policy.
    score_B: float, reward-model units.
    mask_BT: bool, true on real response tokens; the rest may hold anything.
    kl_coef: reward-model units per nat.
    score_clip: the score is held within +- this; 0 = no clipping.
    score_column_B: int32, where the score is added, if it is no padding; None =
      on the last real token.

  Returns:
    float [B, T], reward-model units; 0 on padding. A row without a token gets
    nothing, its score neither.

  Source: arXiv 2410.02743, section 2.2. The authors' code puts the score on the
  first padding token where there is one, and loses it.
  """
  chex.assert_rank(mask_BT, 2)
  chex.assert_shape(score_B, (mask_BT.shape[0],))
  kl_BT = log_ratio(logprobs_BT, ref_logprobs_BT, mask_BT)
  score_B = score_B.astype(jnp.result_type(score_B, kl_BT))
  if score_clip:
    score_B = jnp.clip(score_B, -score_clip, score_clip)
  if score_column_B is None:
    score_column_B = masking.last_real(mask_BT)
  column_1T = jnp.arange(mask_BT.shape[1], dtype=jnp.int32)[None]
  scored_BT = mask_BT & (column_1T == score_column_B[:, None])
  return -kl_coef * kl_BT + jnp.where(scored_BT, score_B[:, None], 0)


def adapted_kl_coef(
    kl_coef: Array, kl: Array, *, target: float, horizon: int, responses: int
) -> Array:
  """The coefficient of the next step, drawn towards a KL of `target`.

  kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon)

  Args:
    kl_coef: scalar, reward-model units per nat.
    kl: scalar, nats per response, `objective/kl` of this step. Of filtered
      responses it is not the KL of the policies, nor is then the target.
    target: nats per response, > 0.
    horizon: responses in which the coefficient can change by a factor of about
      e^0.2, where a step has few of them.
    responses: in this step, fewer than `most_responses(horizon)`.

  Returns:
    scalar, above 0 where `kl_coef` is.

  Raises:
    ValueError: if one step could make the coefficient 0, where no later one
      could raise it.

  Source: arXiv 1909.08593, section 2.2.
  """
  if responses >= most_responses(horizon):
    raise ValueError(
        f'horizon={horizon} must be above {MAX_KL_ERROR} * responses, '
        f'{MAX_KL_ERROR * responses:g}'
    )
  error = jnp.clip(kl / target - 1, -MAX_KL_ERROR, MAX_KL_ERROR)
  return kl_coef * (1 + error * (responses / horizon))


def most_responses(horizon: int) -> float:
  """Responses in a step that could make `adapted_kl_coef` 0."""
  return horizon / MAX_KL_ERROR


def kl_estimates(
    logprobs_BT: Array, ref_logprobs_BT: Array, mask_BT: Array
) -> tuple[Array, Array]:
  """Two sampled estimates of the KL from the reference policy, for logging.

  k1 = sum_t log_ratio_t; k3 = mean_t (exp(-log_ratio_t) - 1 + log_ratio_t)

  Args:
    logprobs_BT: float, nats, under the policy.
    ref_logprobs_BT: float, nats, under the reference policy.
    mask_BT: bool, true on real response tokens; the rest may hold anything.

  Returns:
    k1_B: nats per response, may be negative.
    k3: nats per token, scalar >= 0, mean over all real tokens.
    Both are unbiased where tokens were drawn from exactly what gave `logprobs`.
    Drawn with filters, or at another temperature, they are of no two
    distributions.

  Source: http://joschu.net/blog/kl-approx.html
  """
  log_ratio_BT = log_ratio(logprobs_BT, ref_logprobs_BT, mask_BT)
  bounded_BT = bounded(log_ratio_BT)
  k3_BT = jnp.expm1(-bounded_BT) + bounded_BT
  return jnp.sum(log_ratio_BT, axis=1), masking.masked_mean(k3_BT, mask_BT)
