"""A small tokenizer and a whole export, for the tests of the model room."""

import pathlib
import shutil
from typing import Any

import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax.data.tokenizer import load_tokenizer, train_tokenizer
from ma_rlhf_jax.models import exporting
from tests.models.drawn import UNUSUAL, draw

_TEXTS = ['the cat sat on the mat', 'a dog ran after the cat, then slept'] * 9


@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
  folder = str(tmp_path_factory.mktemp('tokenizer'))
  train_tokenizer(_TEXTS, 300, folder)
  return load_tokenizer(folder)


@pytest.fixture(scope='session')
def _written(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('written') / 'hf'
  params = draw('policy', UNUSUAL, seed=4)
  exporting.save(folder, params, UNUSUAL, 'policy', tokenizer)
  return folder


@pytest.fixture
def export(_written: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A whole policy, `UNUSUAL` of seed 4, that the test may spoil.

  It has no manifest, as a folder that others have made.
  """
  folder = shutil.copytree(_written, tmp_path / 'export')
  (folder / manifest.NAME).unlink()
  return folder
