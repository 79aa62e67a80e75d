"""How many devices share a copy of decoding weights."""

import dataclasses

import pytest

from ma_rlhf_jax.models import presets
from ma_rlhf_jax.parallel import chips
from ma_rlhf_jax.rollout import split

_V5E = chips.TPUS['v5e']


def _work(
    name: str, mesh: tuple[int, int, int], rows: int = 256
) -> split.Decoding:
  shape = dataclasses.replace(presets.PRESETS[name], dtype='bfloat16')
  return split.Decoding(shape, mesh, rows, 1024)


def test_a_token_takes_what_it_reads_sends_and_waits_for() -> None:
  work = _work('gemma-7b', (1, 64, 1))
  # 8.54e9 weights of two bytes by 16; 64 rows of 1024 tokens of 448 KiB by 16.
  weights, cache = 8_537_680_896 * 2 / 16, 64 * 1024 * 448 * 1024 / 16
  assert work.weights(16) == weights and work.cache(16) == cache
  read = (weights + 0.75 * cache) / (819e9 * 0.6)
  # 57 sums of 64 x 3072 numbers of two bytes, there and back.
  sent = 57 * 2 * 15 / 16 * (64 * 3072 * 2) / (50e9 * 0.7)
  # Two rounds of 2 * (4 - 1) hops and the start; 30 of one round.
  waits = (57 * 13 + 30 * 7) * 1e-6
  found = split.token_seconds(work, _V5E, 16)
  assert found == pytest.approx(read + sent + waits)


def test_the_split_that_draws_a_token_soonest_is_taken() -> None:
  work = _work('gemma-7b', (1, 64, 1))
  seconds = {n: split.token_seconds(work, _V5E, n) for n in work.choices}
  assert list(seconds) == [1, 2, 4, 8, 16]  # of 16 heads
  assert split.fastest(work, _V5E) == min(seconds, key=seconds.get) == 16
  # Small weights are not worth the waiting.
  tiny = dataclasses.replace(
      work.config, num_layers=2, mlp_dim=64, embed_dim=64, vocab_size=256
  )
  work = dataclasses.replace(work, config=tiny)
  assert split.fastest(work, _V5E) == 1


def test_a_copy_is_split_further_where_memory_asks_for_it() -> None:
  # As fast as light, of 15.75 GiB: half is for 15.9 of weights, so three or
  # more devices, and of 16 heads four.
  chip = dataclasses.replace(_V5E, hbm=1e30)
  assert split.fastest(_work('gemma-7b', (1, 8, 1), rows=8), chip) == 4
  # Where it never fits, all that there are: 50.7 GiB by 2.
  assert split.fastest(_work('gemma-2-27b', (1, 2, 1)), _V5E) == 2


def test_the_mesh_of_training_bounds_the_choice() -> None:
  assert _work('gemma-2b', (2, 2, 4)).choices == [4, 8]
  assert _work('gemma-2b', (8, 1, 1)).choices == [1]


def test_key_heads_that_cannot_be_split_lie_on_all_devices() -> None:
  work = _work('gemma-2-2b', (1, 8, 1))  # four key heads, eight query heads
  token = 2 * 26 * 4 * 256 * 2
  assert work.cache(4) == 128 * 1024 * token / 4
  assert work.cache(8) == 256 * 1024 * token
