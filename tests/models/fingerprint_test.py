"""Tests of `models.fingerprint`."""

import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from ma_rlhf_jax.models import fingerprint
from tests.models.weight_files_test import SINGLE


def _made(folder: pathlib.Path, **tensors: np.ndarray) -> str:
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text('{}')
  save_file(tensors, folder / SINGLE)
  return fingerprint.of_folder(folder)


def test_a_value_a_name_and_a_config_count_and_the_place_does_not(
    tmp_path: pathlib.Path,
) -> None:
  a, b = np.arange(7.0), np.arange(300_000, dtype=np.float32)
  first = _made(tmp_path / 'one', a=a, b=b)
  shutil.copytree(tmp_path / 'one', tmp_path / 'two')
  assert fingerprint.of_folder(tmp_path / 'two') == first
  (tmp_path / 'two' / 'config.json').write_text('{"x": 1}')
  assert fingerprint.of_folder(tmp_path / 'two') != first
  changed = a.copy()
  changed[3] += 1e-9
  last = b.copy()
  last[-1] += 1.0
  others = [
      _made(tmp_path / 'three', **tensors)
      for tensors in (
          {'a': changed, 'b': b},
          {'c': a, 'b': b},
          {'a': a, 'b': last},
          {'a': a, 'b': b * 1.001},
      )
  ]
  assert len({first, *others}) == 5


def test_a_broken_file_is_refused(tmp_path: pathlib.Path) -> None:
  _made(tmp_path / 'one', a=np.ones(3))
  (tmp_path / 'one' / SINGLE).write_bytes(b'12')
  with pytest.raises(ValueError, match='is not a whole safetensors file'):
    fingerprint.of_folder(tmp_path / 'one')
