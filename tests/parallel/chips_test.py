"""Datasheets by device, and what a collective waits for."""

import types

import jax
import pytest

from ma_rlhf_jax.parallel import chips


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        ('TPU v5 lite', 'v5e'),
        ('TPU v5', 'v5p'),
        ('TPU v5p', 'v5p'),
        ('TPU v6 lite', 'v6e'),
        ('TPU7x', 'tpu7x'),
        ('NVIDIA H100 80GB HBM3', 'h100'),
        ('NVIDIA A100-SXM4-40GB', 'a100-40'),
        ('NVIDIA A100-SXM4-80GB', 'a100'),
        ('NVIDIA L40S', 'l40s'),
        ('NVIDIA L4', 'l4'),
    ],
)
def test_a_device_is_known_by_its_kind(kind: str, name: str) -> None:
  device = types.SimpleNamespace(device_kind=kind)
  assert chips.of_device(device) is (chips.TPUS | chips.GPUS)[name]


def test_a_device_without_a_datasheet_is_taken_for_a_v5e() -> None:
  assert chips.of_device(jax.devices('cpu')[0]) is chips.TPUS['v5e']


def test_small_collectives_wait_for_hops() -> None:
  v5e, v5p = chips.TPUS['v5e'], chips.TPUS['v5p']
  assert chips.latency(v5e, 1) == 0
  # 16 chips are 4 x 4: three hops along each side, and the start.
  assert chips.latency(v5e, 16) == pytest.approx(7e-6)
  assert chips.latency(v5e, 16, rounds=2) == pytest.approx(13e-6)
  assert chips.latency(v5p, 64) == pytest.approx(10e-6)  # 4 x 4 x 4
  assert chips.latency(chips.GPUS['h100'], 8) == chips.SWITCH_SECONDS
