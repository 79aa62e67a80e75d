"""Losses of the reward model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.objective import preference
from ma_rlhf_jax.structs import PairBatch, SequenceBatch
from tests.oracle import cases, need, tensor

# P = 3, T = 4. Pair 0: the rejected row is shorter. Pair 1: they first differ
# in the second response token. Pair 2: equal rows.
CHOSEN = [[0, 2, 5, 6, 7, 8, 1], [2, 4, 9, 6, 1, 0, 0], [0, 0, 2, 8, 1, 0, 0]]
REJECTED = [[0, 2, 5, 9, 1, 0, 0], [2, 4, 9, 6, 3, 7, 1], [0, 0, 2, 8, 1, 0, 0]]
CHOSEN_REWARDS = [
    [99, 5, 4, 1, 2, -1, 3],
    [5, 4, 3, 2, 0.5, 99, 99],
    [99, 99, 3, 4, -2, 99, 99],
]
REJECTED_REWARDS = [
    [88, 5, 4, 0.5, -1, 88, 88],
    [5, 4, 3, 2, 1.5, -1, 2],
    [88, 88, 3, 4, -2, 88, 88],
]
LOSSES = tuple(preference.PAIR_LOSSES)
pair_loss = jax.jit(preference.pair_loss, static_argnames='loss')


def _nll(margin: float) -> float:
  return math.log1p(math.exp(-margin))


def _rows(tokens: list[list[int]]) -> SequenceBatch:
  tokens = np.asarray(tokens, np.int32)
  mask = tokens != 0
  return SequenceBatch(
      tokens_BL=tokens, mask_BL=mask, response_mask_BT=mask[:, 3:]
  )


def _pairs(order=(0, 1, 2)) -> PairBatch:
  pick = lambda tokens: _rows([tokens[i] for i in order])
  return PairBatch(chosen=pick(CHOSEN), rejected=pick(REJECTED))


def _rewards(pad: float | None = None, order=(0, 1, 2)):
  pairs = _pairs(order)
  for rewards, rows in (
      (CHOSEN_REWARDS, pairs.chosen),
      (REJECTED_REWARDS, pairs.rejected),
  ):
    rewards = np.asarray([rewards[i] for i in order], np.float32)
    yield rewards if pad is None else np.where(
        rows.mask_BL, rewards, np.float32(pad)
    )


def _loss(name: str, order=(0, 1, 2), pad: float | None = None):
  return pair_loss(
      *_rewards(pad, order),
      _pairs(order),
      loss=name,
      pad_id=0,
      num_padding_at_beginning=0,
  )


# Pair 0: columns 3 to 6, rejected .5, -1, then its score -1 held.
PAIR_0 = (_nll(0.5) + _nll(3) + _nll(0) + _nll(4)) / 4
# Pair 1: columns 4 to 6, chosen's score .5 held.
PAIR_1 = (_nll(-1) + _nll(1.5) + _nll(-1.5)) / 3


def test_per_token_loss_by_hand():
  want = (PAIR_0 + PAIR_1 + _nll(0)) / 3
  np.testing.assert_allclose(_loss('per_token'), want, rtol=1e-6)


def test_last_token_loss_by_hand():
  # 3 - -1; .5 - 2; equal
  want = (_nll(4) + _nll(-1.5) + _nll(0)) / 3
  np.testing.assert_allclose(_loss('last_token'), want, rtol=1e-6)


def test_authors_loss_uses_the_pads_of_the_shorter_row():
  # Pair 0: 1 - .5, 2 - -1, -1 - 88, 3 - 88; pair 1: .5 - 1.5, 99 - -1, 99 - 2.
  pair_0 = (_nll(0.5) + _nll(3) + 89 + 85) / 4
  pair_1 = (_nll(-1) + 0 + 0) / 3
  # Pair 2 after moving its padding to the right: 99 - 88 in the last column.
  want = (pair_0 + pair_1 + _nll(11)) / 3
  np.testing.assert_allclose(_loss('authors'), want, rtol=1e-6)


def test_losses_differing_in_the_last_token_only_are_the_same():
  tokens = [[2, 5, 1]], [[2, 5, 7]]
  rewards = np.array([[9.0, 3, 2]]), np.array([[9.0, 3, 0.5]])
  pairs = PairBatch(chosen=_rows(tokens[0]), rejected=_rows(tokens[1]))
  for name in LOSSES:
    got = pair_loss(
        *rewards, pairs, loss=name, pad_id=0, num_padding_at_beginning=0
    )
    np.testing.assert_allclose(got, _nll(1.5), rtol=1e-6)


@pytest.mark.parametrize('name', ['per_token', 'last_token'])
def test_rewards_of_pads_do_not_matter(name: str):
  assert float(_loss(name, pad=math.nan)) == float(_loss(name))


@pytest.mark.parametrize('name', LOSSES)
def test_row_order_and_jit_change_nothing(name: str):
  moved = _loss(name, order=(2, 0, 1))
  np.testing.assert_allclose(moved, _loss(name), rtol=1e-6)
  with jax.disable_jit():
    np.testing.assert_allclose(_loss(name), moved, rtol=1e-6)


@pytest.mark.parametrize('name', ['per_token', 'last_token'])
def test_pairs_without_tokens_are_left_out(name: str):
  rewards = [
      np.concatenate([x, np.full((1, 7), np.float32('nan'))])
      for x in _rewards()
  ]
  pairs = PairBatch(
      chosen=_rows([*CHOSEN, [0] * 7]), rejected=_rows([*REJECTED, [0] * 7])
  )
  got = pair_loss(
      *rewards, pairs, loss=name, pad_id=0, num_padding_at_beginning=0
  )
  np.testing.assert_allclose(got, _loss(name), rtol=1e-6)


@pytest.mark.parametrize('name', ['per_token', 'last_token'])
def test_gradients_are_zero_on_padding_and_finite_elsewhere(name: str):
  def cost(chosen, rejected):
    return preference.pair_loss(
        chosen,
        rejected,
        _pairs(),
        loss=name,
        pad_id=0,
        num_padding_at_beginning=0,
    )

  grads = jax.jit(jax.grad(cost, argnums=(0, 1)))(*_rewards(math.nan))
  for grad, rows in zip(
      grads, (_pairs().chosen, _pairs().rejected), strict=True
  ):
    assert np.isfinite(grad).all()
    assert not np.any(np.where(rows.mask_BL, 0, grad))
  # Chosen row 1 ends in column 4: its score's gradient, a third of a pair.
  sigmoid = lambda x: 1 / (1 + math.exp(-x))
  if name == 'last_token':
    np.testing.assert_allclose(grads[0][1, 4], -sigmoid(1.5) / 3, rtol=1e-6)
  else:
    # It stands in for two columns more: margins -1, 1.5, -1.5.
    want = -(sigmoid(1) + sigmoid(-1.5) + sigmoid(1.5)) / 9
    np.testing.assert_allclose(grads[0][1, 4], want, rtol=1e-6)


def test_end_scores_and_accuracy():
  chosen, rejected = _rewards(math.nan)
  chosen = masking.end_scores(chosen, _pairs().chosen.mask_BL)
  rejected = masking.end_scores(rejected, _pairs().rejected.mask_BL)
  assert chosen.tolist() == [3, 0.5, -2]
  assert rejected.tolist() == [-1, 2, -2]
  # Won, lost, tied.
  got = preference.pair_accuracy(chosen, rejected)
  np.testing.assert_allclose(got, 1 / 3, rtol=1e-6)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    rewards = [x.astype(np.float64) for x in _rewards()]
    for name in LOSSES:
      got = pair_loss(
          *rewards, _pairs(), loss=name, pad_id=0, num_padding_at_beginning=0
      )
      assert got.dtype == jnp.float64


def test_authors_length_passes_over_the_given_number_of_pads():
  tokens = jnp.array([[3, 4, 0, 0, 0], [3, 4, 5, 6, 0], [3, 4, 5, 6, 7]])
  length = lambda n: preference.authors_length(
      tokens, pad_id=0, num_padding_at_beginning=n
  ).tolist()
  assert length(0) == [2, 4, 5]
  assert length(1) == [3, 5, 5]


@jax.jit
def _authors(rewards, tokens, num_padding: int):
  """The authors' loss and the end scores of chosen and rejected rows."""
  padding = dict(pad_id=0, num_padding_at_beginning=num_padding)
  column_1L = jnp.arange(tokens[0].shape[1])[None]
  scores = [
      masking.end_scores(
          x, column_1L < preference.authors_length(ids, **padding)[:, None]
      )
      for x, ids in zip(rewards, tokens, strict=True)
  ]
  return preference.authors_pair_loss(*rewards, *tokens, **padding), scores


def test_oracle_pairwise_losses():
  found = [
      case
      for case in cases('reward_model/cases.json')
      if case['kind'] == 'pairwise'
  ]
  need(found, 'pairs')
  halves = lambda x: np.split(x, 2)
  close = lambda got, want: np.testing.assert_allclose(
      got, want, rtol=1e-10, atol=1e-10
  )
  with jax.enable_x64(True):
    for case in found:
      want = case['f64']
      loss, scores = _authors(
          halves(tensor(want['token_rewards'])),
          halves(np.array(case['input_ids'])),
          case['num_padding_at_beginning'],
      )
      assert loss.dtype == jnp.float64
      close(loss, float(want['loss']))
      close(scores[0], tensor(want['chosen_mean_scores']))
      close(scores[1], tensor(want['rejected_mean_scores']))
