"""`-p tests.margins` lists the comparisons that came near to their tolerance.

  python -m pytest -q -p tests.margins tests/rollout tests/training

A tolerance that was read off one processor fails on another. So each comparison
of numbers is measured: its ratio is the largest difference, as a part of what
is allowed. Of every line the largest ratio counts, and those above a tenth are
listed at the end. To see what other processors do, set flags of XLA first:

  XLA_FLAGS='--xla_cpu_max_isa=SSE4_2 --xla_cpu_multi_thread_eigen=false'
  XLA_FLAGS='--xla_cpu_max_isa=AVX2 --xla_backend_optimization_level=3
      --xla_cpu_use_fusion_emitters=true'

Bare `assert abs(a - b) < c` are not seen.
"""

from collections.abc import Callable
import importlib
import sys
from typing import Any

import numpy as np
import pytest

_SHOWN = 0.1
_count = 0
_largest: dict[str, float] = {}


def _place() -> str:
  """File and line of the test that compares."""
  frame = sys._getframe(2)
  while frame is not None:
    name = frame.f_code.co_filename
    inside = '/tests/' in name and 'site-packages' not in name
    if inside and not name.endswith(('/tests/margins.py', '/tolerance.py')):
      return f'tests/{name.rpartition("/tests/")[2]}:{frame.f_lineno}'
    frame = frame.f_back
  return '?'


def _note(place: str, ratio: float) -> None:
  global _count
  _count += 1
  _largest[place] = max(ratio, _largest.get(place, 0.0))


def ratio(found: Any, want: Any, rtol: float, atol: Any) -> float:
  """The largest difference as a part of `atol + rtol * |want|`.

  Args:
    found: numbers.
    want: as many, or some that broadcast.
    rtol: relative tolerance.
    atol: absolute tolerance.

  Returns:
    0 where all are equal, infinity where nothing is allowed or one is nan.
  """
  a, b = np.broadcast_arrays(
      np.asarray(found, np.float64), np.asarray(want, np.float64)
  )
  same = (a == b) | (np.isnan(a) & np.isnan(b))
  with np.errstate(all='ignore'):
    parts = np.abs(a - b) / (atol + rtol * np.abs(b))
  parts = np.where(same, 0, np.where(np.isnan(parts), np.inf, parts))
  return float(parts.max(initial=0))


def _is_float(x: Any) -> bool:
  dtype = np.asarray(x).dtype
  return np.issubdtype(dtype, np.floating) or dtype.name == 'bfloat16'


def _measured_allclose(plain: Callable[..., None]) -> Callable[..., None]:
  def assert_allclose(
      actual: Any, desired: Any, rtol: float = 1e-7, atol: Any = 0, **how: Any
  ) -> None:
    _note(_place(), ratio(actual, desired, rtol, atol))
    plain(actual, desired, rtol, atol, **how)

  return assert_allclose


def _measured_equal(plain: Callable[..., None]) -> Callable[..., None]:
  def assert_array_equal(actual: Any, desired: Any, *rest, **how: Any) -> None:
    if _is_float(actual) and np.shape(actual) == np.shape(desired):
      _note(_place(), ratio(actual, desired, 0, 0))
    plain(actual, desired, *rest, **how)

  return assert_array_equal


def _measured_approx(plain: Callable[..., bool]) -> Callable[..., bool]:
  def equal(self: Any, actual: Any) -> bool:
    if isinstance(self.expected, int | float | np.floating):
      _note(_place(), ratio(actual, self.expected, 0, self.tolerance))
    return plain(self, actual)

  return equal


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
  """Puts the measured comparisons in the place of the plain ones."""
  testing = np.testing
  testing.assert_allclose = _measured_allclose(testing.assert_allclose)
  testing.assert_array_equal = _measured_equal(testing.assert_array_equal)
  # Of sequences, mappings and arrays it compares the numbers.
  approx = importlib.import_module(type(pytest.approx(1.0)).__module__)
  scalar = approx.ApproxScalar
  scalar.__eq__ = _measured_approx(scalar.__eq__)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> None:
  """Tells how many comparisons there were, and those with a thin margin."""
  told = terminalreporter.write_line
  told(f'{_count} comparisons at {len(_largest)} places')
  order = sorted(_largest.items(), key=lambda item: -item[1])
  for place, part in order:
    if part > _SHOWN:
      told(f'{part:9.3g} of the tolerance at {place}')
