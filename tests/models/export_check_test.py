"""What a receipt says: by hand, and of folders that were spoilt."""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ma_rlhf_jax.models import export_check, exporting
from ma_rlhf_jax.models.export_check import ExportCheckError
from ma_rlhf_jax.structs import Params
from tests import tiny, tolerance
from tests.models.drawn import UNUSUAL, draw, states

SHAPE = dataclasses.replace(UNUSUAL, num_layers=1, remat='none')
# Token ids with BOS first; the last row is longer than what is compared.
LONG = [2, *(3 + i % 40 for i in range(69))]
ROWS = [[2, 9, 30, 7, 41], [2, 11], LONG]


def _right_padded() -> tuple[np.ndarray, np.ndarray]:
  """The rows the other way around: tokens and mask."""
  tokens = np.zeros((len(ROWS), 70), np.int32)
  mask = np.zeros((len(ROWS), 70), bool)
  for i, row in enumerate(ROWS):
    tokens[i, : len(row)] = row
    mask[i, : len(row)] = True
  return tokens, mask


def _rounding(kind: str, params: Params) -> list[float]:
  """How far what `ours` says may be off; the longest row has 70 tokens."""
  ours = lambda p: export_check.ours(kind, SHAPE, p, ROWS)
  return tolerance.of_sums(ours, (params,), 70)


def test_logits_are_those_of_the_last_tokens_of_each_row() -> None:
  params = draw('policy', SHAPE, seed=1)
  found = export_check.ours('policy', SHAPE, params, ROWS)
  hidden = np.asarray(states(SHAPE, params, *_right_padded()))
  last = [hidden[0, :5], hidden[1, :2], hidden[2, 6:]]
  want = np.concatenate(last) @ np.asarray(params['embedding']).T
  assert found.shape == want.shape == (5 + 2 + 64, 320)
  tolerance.assert_close(found, want, _rounding('policy', params))


def test_scores_are_those_at_the_end_of_each_row() -> None:
  params = draw('scalar', SHAPE, seed=1)
  found = export_check.ours('scalar', SHAPE, params, ROWS)
  hidden = states(SHAPE, params['backbone'], *_right_padded())
  want = np.asarray(hidden)[[0, 1, 2], [4, 1, 69]] @ params['head']
  tolerance.assert_close(found, want, _rounding('scalar', params))
  assert found.shape == (3,) and np.ptp(found) > 0.05


def test_sums_are_made_in_float32_on_every_platform(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  seen = []

  def forward(*args: Any) -> np.ndarray:
    seen.append(tiny.matmuls_are_exact())
    return np.zeros(3, np.float32)

  monkeypatch.setattr(export_check, '_forward', forward)
  export_check.ours('scalar', SHAPE, {}, ROWS)
  assert seen == [True]


@pytest.mark.parametrize('kind', ['policy', 'scalar'])
def test_transformers_reads_the_same(
    kind: str, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  pytest.importorskip('torch')
  params = draw(kind, SHAPE, seed=1)
  exporting.save(tmp_path / 'hf', params, SHAPE, kind, tokenizer)
  want = export_check.ours(kind, SHAPE, params, ROWS)
  found, dtype = export_check.by_transformers(
      tmp_path / 'hf', kind, ROWS, num_params=SHAPE.num_params
  )
  assert dtype == 'float32' and found.shape == want.shape
  tolerance.assert_close(found, want, _rounding(kind, params))


def test_a_large_model_is_read_in_the_dtype_of_its_files(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  pytest.importorskip('torch')
  params = draw('policy', SHAPE, seed=1)
  arguments = (tmp_path / 'hf', params, SHAPE, 'policy', tokenizer)
  exporting.save(*arguments, dtype='bfloat16')
  read = lambda size: export_check.by_transformers(
      tmp_path / 'hf', 'policy', ROWS, num_params=size
  )
  assert read(4 * 2**30)[1] == 'float32'
  found, dtype = read(4 * 2**30 + 1)
  assert dtype == 'bfloat16' and found.dtype == np.float32


def test_a_tensor_that_is_missing_is_named(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  pytest.importorskip('torch')
  folder = tmp_path / 'hf'
  params = draw('policy', SHAPE, seed=1)
  exporting.save(folder, params, SHAPE, 'policy', tokenizer)
  tensors = load_file(folder / 'model.safetensors')
  del tensors['model.norm.weight']
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
  with pytest.raises(ExportCheckError, match=r"\['model.norm.weight'\]"):
    export_check.by_transformers(folder, 'policy', ROWS, num_params=9)


def test_a_config_that_transformers_refuses_is_told(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  pytest.importorskip('torch')
  odd = dataclasses.replace(SHAPE, family='gemma2', embed_dim=26)
  params = draw('policy', odd, seed=1)
  exporting.save(tmp_path / 'hf', params, odd, 'policy', tokenizer)
  with pytest.raises(ExportCheckError, match='cannot read .*hidden size'):
    export_check.by_transformers(tmp_path / 'hf', 'policy', ROWS, num_params=9)


@pytest.mark.parametrize('absent, adapter', [('torch', None), ('peft', 'x')])
def test_without_its_package_a_reader_says_nothing(
    absent: str, adapter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
  find = importlib.util.find_spec
  monkeypatch.setattr(
      importlib.util,
      'find_spec',
      lambda name: None if name == absent else find(name),
  )
  found = export_check.by_transformers(
      'nowhere', 'policy', ROWS, num_params=9, adapter=adapter
  )
  assert found is None


def test_differences_by_hand() -> None:
  want = np.asarray([[3.0, 1.0], [-1.0, 5.0]], np.float32)
  got = np.asarray([[3.0, 3.5], [-1.25, 5.0]], np.float32)
  # mean of 9, 1, 1 and 25 is 9, so the root mean square is 3
  assert export_check.difference('policy', want, got, 0.5) == {
      'max_logit_difference': 2.5,
      'max_logit_difference_allowed': 1.5,
      'top1_agreement': 0.5,
  }
  assert export_check.difference('scalar', want[0], want[0], 0.0) == {
      'max_score_difference': 0.0,
      'max_score_difference_allowed': 0.0,
  }


@pytest.mark.parametrize('largest', [1.5001, float('nan'), float('inf')])
def test_more_than_rounding_is_an_error(largest: float) -> None:
  found = {'max_score_difference': 1.5, 'max_score_difference_allowed': 1.5}
  export_check.require_small('peft', 'scalar', found)
  found['max_score_difference'] = largest
  with pytest.raises(ExportCheckError, match='what peft reads back differs'):
    export_check.require_small('peft', 'scalar', found)


def test_one_wrong_tensor_is_far_beyond_rounding(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  pytest.importorskip('torch')
  folder = tmp_path / 'hf'
  params = draw('policy', SHAPE, seed=1)
  exporting.save(folder, params, SHAPE, 'policy', tokenizer)
  want = export_check.ours('policy', SHAPE, params, ROWS)
  content = json.loads((folder / 'config.json').read_text())
  content['rope_parameters']['rope_theta'] = 10_000.0  # 500 in truth
  (folder / 'config.json').write_text(json.dumps(content))
  got, _ = export_check.by_transformers(folder, 'policy', ROWS, num_params=9)
  found = export_check.difference(
      'policy', want, got, export_check.ROUNDING['float32']
  )
  with pytest.raises(ExportCheckError):
    export_check.require_small('transformers', 'policy', found)


def test_hashes_and_versions(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'b').write_bytes(b'two')
  (tmp_path / 'a').write_bytes(b'one')
  (tmp_path / 'folder').mkdir()
  assert list(export_check.sha256_of_files(tmp_path).items()) == [
      ('a', hashlib.sha256(b'one').hexdigest()),
      ('b', hashlib.sha256(b'two').hexdigest()),
  ]
  found = export_check.versions()
  assert found['jax'].count('.') == 2 and 'transformers' in found
