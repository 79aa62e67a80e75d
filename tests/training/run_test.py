"""What the stages share: batches on the devices, text, a rule of the host."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from ma_rlhf_jax.data import batches
from ma_rlhf_jax.training import run as run_lib
from tests import tiny


def test_a_spec_holds_what_programs_need(tmp_path: pathlib.Path) -> None:
  run = tiny.run(tmp_path, tiny.config(seed=3), mesh=tiny.mesh(2, 1, 1))
  spec = run.spec
  assert spec.config is run.config and spec.mesh is run.mesh
  assert (spec.prompt_len, spec.response_len) == (6, 8)
  assert (spec.pad_id, spec.eos_id) == (0, 1)


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


def test_the_rule_of_the_host_has_the_fields_of_the_config(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  seen: list[Any] = []
  monkeypatch.setattr(
      run_lib, 'HostTermination', lambda settings, _: seen.append(settings)
  )
  fields = {
      'parser': 'tests.trees:parse',
      'parse_cutoff': 3,
      'parse_fallback': 'one',
      'parse_workers': 2,
      'ngram': 7,
  }
  config = tiny.config(
      macro__termination='parsing',
      **{f'macro__{name}': value for name, value in fields.items()},
  )
  tiny.run(tmp_path, config).host_termination()
  (settings,) = seen
  assert {name: getattr(settings, name) for name in fields} == fields


def test_rules_of_the_device_ask_no_host(tmp_path: pathlib.Path) -> None:
  assert tiny.run(tmp_path, tiny.config()).host_termination() is None
