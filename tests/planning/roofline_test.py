"""The terms."""

import dataclasses

import pytest

from ma_rlhf_jax.planning import loops, roofline, topology, traffic
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


def _sent(trips: int, *, early: bool, beside: bool) -> traffic.Collective:
  around = (loops.Loop('loop', trips, early),)
  return traffic.Collective('all-reduce', (), 4, 8.0, around, '', beside)


def test_collectives_that_are_waited_for_take_time_on_top() -> None:
  sent = (
      _sent(100, early=True, beside=True),  # for every token
      _sent(10, early=False, beside=False),
      _sent(10**6, early=False, beside=True),  # goes on beside products
  )
  program = dataclasses.replace(_PROGRAM, collectives=sent)
  found = roofline.seconds(program, topology.parse('v5e:2x2'), _SHARES)
  # Four chips are 2 x 2: two hops, there and back, and the start.
  assert found.latency == pytest.approx(110 * 5e-6)
  assert found.total == pytest.approx(found.compute + found.latency)
  told = dataclasses.replace(program, waits=3.0)
  found = roofline.seconds(told, topology.parse('v5e:2x2'), _SHARES)
  assert (found.latency, found.bound) == (3.0, 'compute')
  alone = roofline.seconds(told, topology.parse('v5e:1x1'), _SHARES)
  assert alone.latency == 0


def test_assumptions_are_told() -> None:
  told = ' '.join(roofline.assumptions(topology.parse('v5e:8x16'), _SHARES))
  for word in ('197', '819', '0.25', '8 line x 16 ring', '150 GB/s', '1 us'):
    assert word in told
