"""Which prompts are drawn together, in what shape, and with which key."""

import numpy as np
import pytest

from ma_rlhf_jax.generation import batching
from ma_rlhf_jax.generation.batching import Batch, Item


@pytest.mark.parametrize(
    ('length', 'columns'),
    [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (4097, 8192)],
)
def test_widths_are_few(length: int, columns: int):
  assert batching.width(length) == columns


def test_the_longest_come_first_and_a_width_is_never_mixed():
  found = batching.plan([9, 40, 3, 70, 33, 12], num_samples=1, batch_size=2)
  item = lambda row: Item(row, 0)
  assert found == [
      Batch(128, [item(3)]),
      Batch(64, [item(1), item(4)]),
      Batch(32, [item(5), item(0)]),
      Batch(32, [item(2)]),
  ]


def test_samples_of_a_prompt_stay_together():
  found = batching.plan([5, 9], num_samples=3, batch_size=4)
  assert found == [
      Batch(32, [Item(1, 0), Item(1, 1), Item(1, 2), Item(0, 0)]),
      Batch(32, [Item(0, 1), Item(0, 2)]),
  ]


def test_every_sample_of_every_prompt_is_drawn_once():
  lengths = np.random.default_rng(0).integers(1, 300, 50).tolist()
  found = [i for b in batching.plan(lengths, 3, 7) for i in b.items]
  want = [Item(row, sample) for row in range(50) for sample in range(3)]
  assert sorted(found) == want


def test_keys_are_of_the_prompt_and_its_occurrence():
  a, b = [2, 7], [2, 7, 7]
  keys = batching.prompt_keys([a, b, a, a])
  assert len(set(keys)) == 4
  assert batching.prompt_keys([b]) == [keys[1]]
  assert batching.prompt_keys([a, a]) == [keys[0], keys[2]]
  assert all(0 <= key < 2**31 for key in keys)
  # The first 31 bits of the SHA-256 of the bytes 2 0 0 0 7 0 0 0 # 0, typed
  # here so that a later release gives the same text.
  assert keys[0] == 71811722


def test_arrays_are_padded_on_the_left_and_filled_with_the_last_row():
  prompts = [[2, 5, 6], [2], [2, 9]]
  made = batching.prompt_batch(
      Batch(4, [Item(0, 1), Item(2, 0)]),
      prompts,
      [70, 71, 72],
      rows=4,
      pad_id=0,
  )
  assert made.tokens_BP.tolist() == [
      [0, 2, 5, 6],
      [0, 0, 2, 9],
      [0, 0, 2, 9],
      [0, 0, 2, 9],
  ]
  assert made.mask_BP.tolist() == (made.tokens_BP > 0).tolist()
  assert made.prompt_ids_B.tolist() == [70, 72, 72, 72]
  assert made.sample_ids_B.tolist() == [1, 0, 0, 0]
  assert made.tokens_BP.dtype == made.prompt_ids_B.dtype == np.int32
