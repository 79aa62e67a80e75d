"""The three terms."""

import pytest

from ma_rlhf_jax.planning import roofline, topology
from ma_rlhf_jax.planning.compiling import Compiled

_SHARES = roofline.Shares(compute=0.5, hbm=0.25, wire=0.2)
_PROGRAM = Compiled(None, 0, 197 * 10**13, 0, 0, hbm_bytes=819e9, wire=30e9)


def test_seconds_are_work_over_what_is_reached() -> None:
  found = roofline.seconds(_PROGRAM, topology.parse('v5e:2x2'), _SHARES)
  assert found.compute == pytest.approx(10 / 4 / 0.5)  # of all four devices
  assert found.hbm == pytest.approx(1 / 0.25)
  assert found.wire == pytest.approx(30 / (2 * 50) / 0.2)
  assert (found.bound, found.total) == ('compute', found.compute)


def test_one_device_sends_nothing() -> None:
  found = roofline.seconds(_PROGRAM, topology.parse('v5e:1x1'), _SHARES)
  assert found.wire == 0


def test_assumptions_are_told() -> None:
  told = ' '.join(roofline.assumptions(topology.parse('v5e:8x16'), _SHARES))
  for word in ('197', '819', '0.25', '8 line x 16 ring', '150 GB/s'):
    assert word in told
