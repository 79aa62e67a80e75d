"""Tests of `parallel.mesh`, on eight CPU devices."""

import jax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax.parallel.mesh import make_mesh, mesh_shape, place


def _config(data: int, fsdp: int, tensor: int) -> ConfigDict:
  return ConfigDict({'data': data, 'fsdp': fsdp, 'tensor': tensor})


@pytest.mark.parametrize(
    ('axes', 'devices', 'shape'),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((2, -1, 2), 24, (2, 6, 2)),
        ((1, 3, -1), 3, (1, 3, 1)),
        ((2, 3, 4), 24, (2, 3, 4)),
    ],
)
def test_mesh_shape(axes: tuple, devices: int, shape: tuple) -> None:
  assert mesh_shape(_config(*axes), devices) == shape


@pytest.mark.parametrize(
    'axes', [(-1, 3, 1), (-1, -1, 1), (2, 2, 1), (16, 1, 1), (0, -1, 1)]
)
def test_a_mesh_that_does_not_cover_the_devices_is_refused(axes: tuple) -> None:
  with pytest.raises(ValueError, match=r'8 devices.*config\.mesh\.data') as e:
    mesh_shape(_config(*axes), 8)
  assert str(axes) in str(e.value)


def test_make_mesh_names_its_axes() -> None:
  mesh = make_mesh(_config(2, -1, 1))
  assert dict(mesh.shape) == {
      'data': 2,
      'fsdp': jax.device_count() // 2,
      'tensor': 1,
  }


def test_rows_are_spread_over_data_and_fsdp() -> None:
  rows = np.arange(24).reshape(8, 3)
  batch = place({'x': rows, 'y': rows[:, 0]}, make_mesh(_config(2, 2, 2)))
  assert batch['x'].sharding.spec == PartitionSpec(('data', 'fsdp'))
  np.testing.assert_array_equal(batch['x'], rows)
  # 4 ways of rows, each twice along `tensor`.
  pieces = [s.data.shape for s in batch['x'].addressable_shards]
  assert pieces == [(2, 3)] * 8
  assert {s.data.shape for s in batch['y'].addressable_shards} == {(2,)}
