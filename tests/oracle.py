"""Reads golden cases made with the authors' code."""

import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest

_DEFAULT = pathlib.Path(__file__).parents[2] / 'shared' / 'oracle'


def folder() -> pathlib.Path:
  """The folder of the golden cases; skips the test where it is absent."""
  path = pathlib.Path(os.environ.get('MA_RLHF_ORACLE', _DEFAULT))
  if not path.is_dir():
    pytest.skip(f'no golden cases at {path}; set MA_RLHF_ORACLE')
  return path


def cases(name: str) -> list[dict[str, Any]]:
  """The cases of one file; never empty."""
  found = json.loads((folder() / name).read_text())['cases']
  assert found, f'{name} holds no case'
  return found


def tensor(values: list) -> np.ndarray:
  """float64 array of (nested) numbers and the strings nan, inf, -inf."""
  return np.vectorize(float, otypes=[np.float64])(np.asarray(values, object))
