"""Reads golden cases made with the authors' code."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.structs import MacroActions

_DEFAULT = pathlib.Path(__file__).parents[2] / 'shared' / 'oracle'
_macro_actions = jax.jit(termination.macro_actions)


def folder() -> pathlib.Path:
  """The folder of the golden cases; skips the test where it is absent."""
  path = pathlib.Path(os.environ.get('MA_RLHF_ORACLE', _DEFAULT))
  if not path.is_dir():
    pytest.skip(f'no golden cases at {path}; set MA_RLHF_ORACLE')
  return path


def cases(name: str) -> list[dict[str, Any]]:
  """The cases of one file; never empty, and as many as it says."""
  file = json.loads((folder() / name).read_text())
  assert file['cases'], f'{name} holds no case'
  assert len(file['cases']) == file['n_cases']
  return file['cases']


def need(found: Any, what: str) -> None:
  """Skips the test where the folder holds nothing of a kind."""
  if not found:
    pytest.skip(f'{folder()} holds no {what}')


def tensor(values: list) -> np.ndarray:
  """float64 array of (nested) numbers and the strings nan, inf, -inf."""
  return np.vectorize(float, otypes=[np.float64])(np.asarray(values, object))


def close(got: Any, want: Any, name: str) -> None:
  """Equal to 1e-10, relatively, in float64; `name` is told where not."""
  assert np.asarray(got).dtype == np.float64, name
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12, err_msg=name)


def pad(x: np.ndarray, width: int, value: float = np.nan) -> jax.Array:
  """`x` with columns added on the right until there are `width`."""
  missing = width - x.shape[1]
  return jnp.asarray(np.pad(x, ((0, 0), (0, missing)), constant_values=value))


def columns(width: int, real: int) -> jax.Array:
  """bool [1, width]: true in the first `real` columns."""
  return jnp.arange(width)[None] < real


def response_mask(case: dict, width: int, name: str = 'action_mask') -> Any:
  """bool [1, width]: the response's real tokens."""
  skip = 0 if name == 'response_mask' else case['start']
  mask = np.array(case[name], bool)[:, skip:]
  return pad(mask, width, False)


def response(case: dict, name: str, width: int) -> jax.Array:
  """float64 [1, width]: the response columns, nan past their end."""
  return pad(tensor(case[name])[:, case['start'] :], width)


def macro_of(
    case: dict, width: int, mask: str = 'action_mask'
) -> tuple[MacroActions, list[int]]:
  """Our macro actions from their boundaries.

  Returns:
    The macro actions, and which of theirs they are: those that hold a real
    token, neither empty nor padding only.
  """
  mask_BT = response_mask(case, width, mask)
  starts = [start - case['start'] for start in case['ma_lengths']]
  ends = [*starts[1:], starts[-1] + 1]
  real_T = np.asarray(mask_BT)[0]
  real = [
      i
      for i, (start, end) in enumerate(zip(starts, ends, strict=True))
      if real_T[start:end].any()
  ]
  opens = np.zeros((1, width), bool)
  opens[0, [starts[i] for i in real]] = True
  return _macro_actions(jnp.asarray(opens), mask_BT), real
