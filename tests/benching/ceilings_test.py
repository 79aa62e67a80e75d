"""Ceilings are medians of calls that have been compiled before."""

import pytest

from ma_rlhf_jax.benching import ceilings


def test_the_first_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
  calls, clock = [], iter([0.0, 9.0, 10.0, 11.0, 20.0, 22.0])
  monkeypatch.setattr(ceilings.time, 'perf_counter', lambda: next(clock))
  assert ceilings.seconds(calls.append, 1, runs=3) == 2.0  # of 9, 1 and 2
  assert len(calls) == 4


def test_what_is_counted_is_what_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(ceilings, 'seconds', lambda *_: 2.0)
  found = ceilings.measure('float32')
  assert found.matmul == 2 * 2 * 1024**3 / 2
  assert found.memory == 2 * 4 * (1 << 26) / 2
