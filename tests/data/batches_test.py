"""Batches by hand, and the position in the data."""

import numpy as np
import pytest

from ma_rlhf_jax.data import batches
from tests.data.rows import DATA, PAD, assert_same


def test_prompt_batch_by_hand() -> None:
  batch = batches.prompt_batch(
      DATA, [2, 0], prompt_len=4, pad_id=99, sample_ids=[3, 5]
  )
  assert batch.tokens_BP.tolist() == [[99, 2, 3, 4], [99, 99, 2, 7]]
  assert batch.mask_BP.tolist() == [
      [False, True, True, True],
      [False, False, True, True],
  ]
  assert batch.prompt_ids_B.tolist() == [2, 0]
  assert batch.sample_ids_B.tolist() == [3, 5]
  for array in (batch.tokens_BP, batch.prompt_ids_B, batch.sample_ids_B):
    assert array.dtype == np.int32
  plain = batches.prompt_batch(DATA, [2], prompt_len=3, pad_id=0)
  assert plain.sample_ids_B.tolist() == [0]


def test_sft_batch_by_hand() -> None:
  batch = batches.sft_batch(
      DATA, [0, 1], prompt_len=3, response_len=4, pad_id=PAD
  )
  assert batch.tokens_BL.tolist() == [
      [0, 2, 7, 8, 1, 0, 0],
      [0, 0, 2, 1, 0, 0, 0],
  ]
  assert batch.mask_BL.astype(int).tolist() == [
      [0, 1, 1, 1, 1, 0, 0],
      [0, 0, 1, 1, 0, 0, 0],
  ]
  assert batch.response_mask_BT.astype(int).tolist() == [
      [1, 1, 0, 0],
      [1, 0, 0, 0],
  ]
  assert batch.tokens_BL.dtype == np.int32
  assert batch.mask_BL.dtype == batch.response_mask_BT.dtype == bool


def test_pair_batch_by_hand() -> None:
  shape = {'prompt_len': 3, 'response_len': 3, 'pad_id': PAD}
  batch = batches.pair_batch(DATA, [2, 1], **shape)
  assert_same(batch.chosen, batches.sft_batch(DATA, [2, 1], **shape))
  assert batch.rejected.tokens_BL.tolist() == [
      [2, 3, 4, 14, 1, 0],
      [0, 0, 2, 11, 12, 13],
  ]
  assert batch.rejected.response_mask_BT.astype(int).tolist() == [
      [1, 1, 0],
      [1, 1, 1],
  ]


@pytest.mark.parametrize('prompt_len, response_len', [(2, 4), (3, 2)])
def test_rows_that_do_not_fit_are_refused(
    prompt_len: int, response_len: int
) -> None:
  with pytest.raises(ValueError, match=r'row 2 has 3 tokens; 2 are allowed'):
    batches.sft_batch(
        DATA,
        [2],
        prompt_len=prompt_len,
        response_len=response_len,
        pad_id=PAD,
    )


@pytest.mark.parametrize('size, batch_size', [(12, 4), (10, 4), (3, 7), (1, 2)])
def test_every_row_comes_once_an_epoch(size: int, batch_size: int) -> None:
  stream = np.concatenate(
      [
          batches.rows_of_step(5, step, size=size, batch_size=batch_size)
          for step in range(6 * size)
      ]
  )
  assert len(stream) == 6 * size * batch_size
  for epoch in range(6 * batch_size):
    rows = stream[epoch * size : (epoch + 1) * size]
    assert sorted(rows.tolist()) == list(range(size))


def test_the_order_follows_seed_and_epoch() -> None:
  step = lambda seed, i: batches.rows_of_step(
      seed, i, size=50, batch_size=50
  ).tolist()
  assert step(1, 0) == step(1, 0)
  assert step(1, 0) != step(2, 0)
  assert step(1, 0) != step(1, 1)
