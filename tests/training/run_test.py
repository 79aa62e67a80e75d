"""What the stages share: random keys, batches on the devices, text."""

import pathlib

import jax
import numpy as np
import pytest

from ma_rlhf_jax.data import batches
from ma_rlhf_jax.training import run as run_lib
from tests import tiny


def test_each_stream_has_a_key_of_its_own(tmp_path: pathlib.Path) -> None:
  run = tiny.run(tmp_path, tiny.config())
  other = tiny.run(tmp_path, tiny.config(seed=1))
  names = run_lib._STREAMS
  data = [
      tuple(np.asarray(jax.random.key_data(r.key(name))).tolist())
      for r in (run, other)
      for name in names
  ]
  assert len(set(data)) == 2 * len(names) >= 12
  again = tiny.run(tmp_path / 'x', tiny.config(ppo__kl_coef=0.5)).key('macro')
  assert jax.random.key_data(again).tolist() == list(data[names.index('macro')])
  with pytest.raises(ValueError):
    run.spec.key('no stream')


def test_missing_rows_are_filled_with_padding(tmp_path: pathlib.Path) -> None:
  run = tiny.run(tmp_path, tiny.config())
  batch = run.batch(batches.sft_batch, run.data.eval, [6, 3], 4)
  # row 6: 6 + 2 tokens; row 3: 5 + 1 tokens
  assert batch.mask_BL.sum(axis=1).tolist() == [8, 6, 0, 0]
  assert batch.response_mask_BT.sum(axis=1).tolist() == [2, 1, 0, 0]
  assert batch.tokens_BL[2:].tolist() == [[tiny.PAD] * 14] * 2
  assert isinstance(batch.tokens_BL, jax.Array)
  whole = run.batch(batches.sft_batch, run.data.eval, [6, 3])
  assert whole.tokens_BL.tolist() == batch.tokens_BL[:2].tolist()


def test_held_out_rows_come_once_in_batches_of_one_shape(
    tmp_path: pathlib.Path,
) -> None:
  run = tiny.run(tmp_path, tiny.config())
  found = list(run.held_out(batches.pair_batch, 3))  # 8 rows
  assert [b.chosen.tokens_BL.shape for b in found] == [(3, 14)] * 3
  real = np.concatenate([b.rejected.mask_BL.any(axis=1) for b in found])
  assert real.tolist() == [True] * 8 + [False]
  tokens = np.concatenate([b.rejected.response_mask_BT for b in found])
  assert tokens.sum(axis=1).tolist() == [6, 2, 8, 3, 1, 8, 7, 5, 0]


def test_text_leaves_out_special_tokens(tmp_path: pathlib.Path) -> None:
  run = tiny.run(tmp_path, tiny.config())
  ids = [tiny.PAD, tiny.BOS, 3, 4, 19, tiny.EOS, tiny.PAD]
  assert run.text(ids) == run.text(np.asarray(ids)) == 'abq'


@pytest.mark.parametrize('given, want', [(0.0, 0.7), (1.0, 1.0), (0.3, 0.3)])
def test_logprobs_are_at_the_sampling_temperature_unless_given(
    tmp_path: pathlib.Path, given: float, want: float
) -> None:
  config = tiny.config(rollout__temperature=0.7, ppo__logprob_temperature=given)
  assert tiny.run(tmp_path, config).logprob_temperature == want


def test_sampling_is_as_the_config_says(tmp_path: pathlib.Path) -> None:
  config = tiny.config(
      rollout__temperature=0.7,
      rollout__top_k=5,
      rollout__top_p=0.9,
      rollout__min_new_tokens=2,
      ppo__samples_per_prompt=3,
  )
  run = tiny.run(tmp_path, config)
  found = run.spec.sampling()
  assert (found.temperature, found.top_k, found.top_p) == (0.7, 5, 0.9)
  assert (found.min_new_tokens, found.max_new_tokens) == (2, 8)
  assert (found.pad_id, found.eos_id) == (0, 1)
  assert run.spec.sampling(0.0).temperature == 0.0  # greedy, not the default
  assert run.spec.rows == 12  # 4 prompts, 3 samples of each
