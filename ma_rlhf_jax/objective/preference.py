"""Losses that make a reward model prefer the chosen row of a pair.

Rewards are the outputs of the scalar head at every column; the score of a row
is the one at its last real token.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.structs import Array, PairBatch, SequenceBatch


def pair_accuracy(chosen_end_B: Array, rejected_end_B: Array) -> Array:
  """Share of pairs whose chosen row scores strictly higher."""
  chex.assert_equal_shape([chosen_end_B, rejected_end_B])
  return jnp.mean(chosen_end_B > rejected_end_B, dtype=jnp.float32)


def _held(rewards_BL: Array, mask_BL: Array) -> Array:
  """Rewards up to the last real token, the score there from then on."""
  column_1L = jnp.arange(mask_BL.shape[1], dtype=jnp.int32)[None]
  past_BL = column_1L > masking.last_real(mask_BL)[:, None]
  scores_B = masking.end_scores(rewards_BL, mask_BL)
  return jnp.where(past_BL, scores_B[:, None], rewards_BL)


def _window_loss(
    margin_BL: Array, first_B: Array, last_B: Array, pair_B: Array
) -> Array:
  """Mean over pairs of the mean of -log_sigmoid over first..last."""
  column_1L = jnp.arange(margin_BL.shape[1], dtype=jnp.int32)[None]
  inside_BL = (column_1L >= first_B[:, None]) & (column_1L <= last_B[:, None])
  margin_BL = jnp.where(inside_BL & pair_B[:, None], margin_BL, 0)
  loss_BL = -jax.nn.log_sigmoid(margin_BL)
  return masking.masked_mean(
      masking.masked_mean(loss_BL, inside_BL, axis=1), pair_B
  )


def _real_pairs(chosen: SequenceBatch, rejected: SequenceBatch) -> Array:
  """bool [B]: both rows have a token."""
  return jnp.any(chosen.mask_BL, axis=1) & jnp.any(rejected.mask_BL, axis=1)


def per_token_pair_loss(
    chosen_rewards_BL: Array,
    rejected_rewards_BL: Array,
    chosen: SequenceBatch,
    rejected: SequenceBatch,
) -> Array:
  """`-log_sigmoid(chosen - rejected)` from the first differing token on.

  # chosen    bos Hi  yes sir eos      window      1 1 1
  # rejected  bos Hi  no  eos pad      rejected's rewards there: no, eos, eos

  The window ends at the later of the two last real tokens. Past the end of the
  shorter row its score stands in, so that no reward of a pad is used. In a pair
  of equal rows the window is their last real token.

  Args:
    chosen_rewards_BL: float, reward-model units; anything on padding.
    rejected_rewards_BL: the same of the rejected rows.
    chosen: the preferred rows. The prompt stands in the same columns of both.
    rejected: the others.

  Returns:
    float scalar, nats: mean over the window, then over the pairs whose rows
    both have a token.

  Source: after DeepSpeed-Chat, which counts pads of the shorter row too.
  """
  chex.assert_equal_shape(
      [chosen_rewards_BL, rejected_rewards_BL, chosen.mask_BL, rejected.mask_BL]
  )
  differ_BL = chosen.tokens_BL != rejected.tokens_BL
  differ_BL |= chosen.mask_BL != rejected.mask_BL
  last_B = jnp.maximum(
      masking.last_real(chosen.mask_BL), masking.last_real(rejected.mask_BL)
  )
  differs_B = jnp.any(differ_BL, axis=1)
  first_B = jnp.where(differs_B, jnp.argmax(differ_BL, axis=1), last_B)
  margin_BL = _held(chosen_rewards_BL, chosen.mask_BL)
  margin_BL -= _held(rejected_rewards_BL, rejected.mask_BL)
  return _window_loss(margin_BL, first_B, last_B, _real_pairs(chosen, rejected))


def last_token_pair_loss(
    chosen_rewards_BL: Array,
    rejected_rewards_BL: Array,
    chosen: SequenceBatch,
    rejected: SequenceBatch,
) -> Array:
  """`-log_sigmoid(chosen - rejected)` of the scores: Bradley-Terry.

  Args:
    chosen_rewards_BL: float, reward-model units; anything on padding.
    rejected_rewards_BL: the same of the rejected rows.
    chosen: the preferred rows.
    rejected: the others.

  Returns:
    float scalar, nats: mean over the pairs whose rows both have a token.

  Source: arXiv 2203.02155, equation 1.
  """
  margin_B = masking.end_scores(chosen_rewards_BL, chosen.mask_BL)
  margin_B -= masking.end_scores(rejected_rewards_BL, rejected.mask_BL)
  pair_B = _real_pairs(chosen, rejected)
  loss_B = -jax.nn.log_sigmoid(jnp.where(pair_B, margin_B, 0))
  return masking.masked_mean(loss_B, pair_B)


def authors_length(
    tokens_BL: Array, *, pad_id: int, num_padding_at_beginning: int
) -> Array:
  """int32 [B]: columns before the pad that ends a row, in the authors' code.

  Args:
    tokens_BL: int32, padded on the right.
    pad_id: the pad token.
    num_padding_at_beginning: pads passed over before one counts as the end;
      0 for Gemma.
  """
  pads_BL = tokens_BL == pad_id
  seen_BL = jnp.cumsum(pads_BL, axis=1, dtype=jnp.int32)
  before_BL = seen_BL <= num_padding_at_beginning
  return jnp.sum(before_BL, axis=1, dtype=jnp.int32)


def authors_pair_loss(
    chosen_rewards_BL: Array,
    rejected_rewards_BL: Array,
    chosen_tokens_BL: Array,
    rejected_tokens_BL: Array,
    *,
    pad_id: int,
    num_padding_at_beginning: int,
) -> Array:
  """The authors' loss: as per token, with the pads of the shorter row.

  Args:
    chosen_rewards_BL: float, reward-model units, pads included.
    rejected_rewards_BL: the same of the rejected rows.
    chosen_tokens_BL: int32, padded on the right.
    rejected_tokens_BL: int32, padded on the right.
    pad_id: the pad token; the first one ends a row wherever it stands.
    num_padding_at_beginning: see `authors_length`.

  Returns:
    float scalar, nats. The window of a pair of equal rows is their last column,
    pad or not, and gives log 2.

  Source: ernie-research/MA-RLHF, dschat/utils/model/reward_model.py.
  """
  chex.assert_equal_shape([chosen_rewards_BL, rejected_rewards_BL])
  chex.assert_equal_shape([chosen_tokens_BL, rejected_tokens_BL])
  length = lambda tokens_BL: authors_length(
      tokens_BL,
      pad_id=pad_id,
      num_padding_at_beginning=num_padding_at_beginning,
  )
  differ_BL = chosen_tokens_BL != rejected_tokens_BL
  differs_B = jnp.any(differ_BL, axis=1)
  final = chosen_tokens_BL.shape[1] - 1
  end_B = jnp.maximum(length(chosen_tokens_BL), length(rejected_tokens_BL))
  return _window_loss(
      chosen_rewards_BL - rejected_rewards_BL,
      jnp.where(differs_B, jnp.argmax(differ_BL, axis=1), final),
      jnp.where(differs_B, end_B - 1, final),
      jnp.ones_like(differs_B),
  )


def _authors_on_layout(
    chosen_rewards_BL: Array,
    rejected_rewards_BL: Array,
    pairs: PairBatch,
    pad_id: int,
    num_padding_at_beginning: int,
) -> Array:
  """`authors_pair_loss` after moving left padding to the right."""
  chosen, rejected = pairs.chosen, pairs.rejected
  return authors_pair_loss(
      masking.left_align(chosen_rewards_BL, chosen.mask_BL),
      masking.left_align(rejected_rewards_BL, rejected.mask_BL),
      masking.left_align(chosen.tokens_BL, chosen.mask_BL),
      masking.left_align(rejected.tokens_BL, rejected.mask_BL),
      pad_id=pad_id,
      num_padding_at_beginning=num_padding_at_beginning,
  )


# Name of config.reward_model.loss -> function of chosen_rewards_BL,
# rejected_rewards_BL, PairBatch, pad_id, num_padding_at_beginning.
PAIR_LOSSES: dict[str, Callable[..., Array]] = {
    'per_token': lambda c, r, pairs, *_: per_token_pair_loss(
        c, r, pairs.chosen, pairs.rejected
    ),
    'last_token': lambda c, r, pairs, *_: last_token_pair_loss(
        c, r, pairs.chosen, pairs.rejected
    ),
    'authors': _authors_on_layout,
}


def pair_loss(
    chosen_rewards_BL: Array,
    rejected_rewards_BL: Array,
    pairs: PairBatch,
    *,
    loss: str,
    pad_id: int,
    num_padding_at_beginning: int,
) -> Array:
  """The loss named `loss`, a key of `PAIR_LOSSES`, on the token layout.

  Args:
    chosen_rewards_BL: float, reward-model units.
    rejected_rewards_BL: the same of the rejected rows.
    pairs: the rows.
    loss: `per_token`, `last_token` or `authors`.
    pad_id: the pad token, for `authors`.
    num_padding_at_beginning: for `authors`, see `authors_length`.

  Returns:
    float scalar, nats, mean over pairs.
  """
  return PAIR_LOSSES[loss](
      chosen_rewards_BL,
      rejected_rewards_BL,
      pairs,
      pad_id,
      num_padding_at_beginning,
  )
