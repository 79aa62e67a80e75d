"""What policy, reference, critic and reward model say about sequences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.models.gemma import hidden_states
from ma_rlhf_jax.models.heads import token_scores
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.rollout.logprobs import token_logprobs
from ma_rlhf_jax.structs import Array, Params, SequenceBatch


def response_logprobs(
    config: GemmaConfig,
    params: Params,
    sequences: SequenceBatch,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool = False,
) -> tuple[Array, Array]:
  """(logprobs_BT, entropy_BT) of the response tokens, nats; 0 on padding."""
  hidden_BLD = hidden_states(
      config, params, sequences.tokens_BL, sequences.mask_BL
  )
  mask_BT = sequences.response_mask_BT
  logprobs_BT, entropy_BT = token_logprobs(
      masking.predictors(hidden_BLD, mask_BT.shape[1]),
      params['embedding'],
      masking.response_tokens(sequences),
      softcap=config.final_softcap,
      temperature=temperature,
      chunk_tokens=chunk_tokens,
      with_entropy=with_entropy,
  )
  return jnp.where(mask_BT, logprobs_BT, 0), jnp.where(mask_BT, entropy_BT, 0)


def response_values(
    config: GemmaConfig, params: Params, sequences: SequenceBatch
) -> Array:
  """float [B, T]: the critic's value of the state before each token."""
  values_BL = token_scores(
      config, params, sequences.tokens_BL, sequences.mask_BL
  )
  mask_BT = sequences.response_mask_BT
  return jnp.where(mask_BT, masking.predictors(values_BL, mask_BT.shape[1]), 0)


def sequence_scores(
    config: GemmaConfig, params: Params, sequences: SequenceBatch
) -> Array:
  """float [B]: the reward model's score at the last real token."""
  scores_BL = token_scores(
      config, params, sequences.tokens_BL, sequences.mask_BL
  )
  return masking.end_scores(scores_BL, sequences.mask_BL)


def sampler_statistics(
    sample_logprobs_BT: Array,
    kept_mass_BT: Array,
    logprobs_BT: Array,
    mask_BT: Array,
) -> dict[str, Array]:
  """How far the sampling distribution is from the one that is trained.

  Args:
    sample_logprobs_BT: nats, under the distribution drawn from.
    kept_mass_BT: mass that top-k, top-p and the EOS ban left.
    logprobs_BT: nats, under the distribution that the ratio uses.
    mask_BT: bool.

  Returns:
    sampler/kl: mean of log(sampling / scoring) over tokens, nats.
    sampler/cut_mass: mean mass removed by the filters, in [0, 1).
  """
  gap_BT = sample_logprobs_BT - logprobs_BT
  return {
      'sampler/kl': masking.masked_mean(gap_BT, mask_BT),
      'sampler/cut_mass': masking.masked_mean(1 - kept_mass_BT, mask_BT),
  }


def in_micro_batches(
    function: Callable[[Any], Any], rows: Any, num: int
) -> Any:
  """`function(rows)` computed over `num` micro-batches, one by one.

  Args:
    function: rows -> rows, each row on its own.
    rows: arrays [B, ...].
    num: divides B.
  """
  if num == 1:
    return function(rows)
  micro = partition.micro_batches(rows, num)
  return partition.merge_micro_batches(jax.lax.map(function, micro))
