"""What policy, reference, critic and reward model say about sequences."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.models.gemma import hidden_and_head
from ma_rlhf_jax.models.heads import token_scores
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.rollout.logprobs import token_logprobs
from ma_rlhf_jax.structs import Array, Models, Params, Scored, SequenceBatch


def _laid_out(
    sequences: SequenceBatch, width: int | None
) -> tuple[Array, Array, int, Callable[[Array], Array]]:
  """Tokens and mask for a model, the last columns that matter, and a function.

  It picks the predicting columns of those; 0 = all matter.
  """
  response_len = sequences.response_mask_BT.shape[1]
  if width is None:
    pick = lambda x_BLx: masking.predictors(x_BLx, response_len)
    return sequences.tokens_BL, sequences.mask_BL, response_len + 1, pick
  tokens_BW, mask_BW, column_BT = masking.compacted(sequences, width)

  def pick(x_BWx: Array) -> Array:
    column = column_BT.reshape(*column_BT.shape, *(1,) * (x_BWx.ndim - 2))
    return jnp.take_along_axis(x_BWx, column, axis=1)

  return tokens_BW, mask_BW, 0, pick


def _on_response(x_BT: Array, mask_BT: Array) -> Array:
  """`x` in all T columns, 0 on padding; it may have fewer."""
  missing = mask_BT.shape[1] - x_BT.shape[1]
  return jnp.where(mask_BT, jnp.pad(x_BT, ((0, 0), (0, missing))), 0)


def response_logprobs(
    config: GemmaConfig,
    params: Params,
    sequences: SequenceBatch,
    *,
    temperature: float,
    with_entropy: bool = False,
    width: int | None = None,
) -> tuple[Array, Array]:
  """(logprobs_BT, entropy_BT) of the response tokens, nats; 0 on padding.

  Args:
    config: shape of the policy.
    params: its parameters.
    sequences: prompts and responses.
    temperature: of the log-probs.
    with_entropy: also compute entropies, else they are 0.
    width: no row has more real tokens; None = all columns are computed.
  """
  tokens, mask, ends, pick = _laid_out(sequences, width)
  hidden, head_VD = hidden_and_head(config, params, tokens, mask, ends)
  states_BTD = pick(hidden)
  mask_BT = sequences.response_mask_BT
  logprobs_BT, entropy_BT = token_logprobs(
      states_BTD,
      head_VD,
      masking.response_tokens(sequences)[:, : states_BTD.shape[1]],
      softcap=config.final_softcap,
      temperature=temperature,
      chunk_tokens=config.logprob_chunk,
      with_entropy=with_entropy,
  )
  return _on_response(logprobs_BT, mask_BT), _on_response(entropy_BT, mask_BT)


def response_values(
    config: GemmaConfig,
    params: Params,
    sequences: SequenceBatch,
    width: int | None = None,
) -> Array:
  """float [B, T]: the critic's value of the state before each token."""
  tokens, mask, ends, pick = _laid_out(sequences, width)
  values_BT = pick(token_scores(config, params, tokens, mask, ends))
  return _on_response(values_BT, sequences.response_mask_BT)


def sequence_scores(
    config: GemmaConfig,
    params: Params,
    sequences: SequenceBatch,
    width: int | None = None,
) -> Array:
  """float [B]: the reward model's score at the last real token."""
  tokens, mask, ends, _ = _laid_out(sequences, width)
  scores = token_scores(config, params, tokens, mask, ends)
  return masking.end_scores(scores, mask[:, -ends:])


def score_rows(
    configs: Models,
    params: Models,
    rows: SequenceBatch,
    *,
    temperature: float,
    width: int | None,
    only: tuple[str, ...] = Models._fields,
) -> Scored:
  """What the models say about finished responses.

  Args:
    configs: `GemmaConfig` of each model.
    params: parameters of each model.
    rows: prompts and responses.
    temperature: of the log-probs.
    width: no row has more real tokens; None = all columns are computed.
    only: the models that are asked; of some the others' entries are None, of
      all the entropy is there too.
  """
  everything = only == Models._fields
  asked = lambda name: name in only and getattr(params, name) is not None
  logprobs = functools.partial(
      response_logprobs, sequences=rows, temperature=temperature, width=width
  )
  found = {}
  if asked('policy'):
    found['logprobs_BT'], entropy_BT = logprobs(
        configs.policy, params.policy, with_entropy=everything
    )
    if everything:  # without a critic every value is 0
      found['entropy_BT'] = entropy_BT
      found['values_BT'] = jnp.zeros_like(found['logprobs_BT'])
  if asked('ref_policy'):
    found['ref_logprobs_BT'], _ = logprobs(
        configs.ref_policy, params.ref_policy
    )
  if asked('critic'):
    values_BT = response_values(configs.critic, params.critic, rows, width)
    found['values_BT'] = values_BT
  if asked('reward_model'):
    found['score_B'] = sequence_scores(
        configs.reward_model, params.reward_model, rows, width
    )
  return Scored(**found)


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
