"""Tests of `parallel.mesh`, on eight CPU devices."""

import dataclasses

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax.parallel import mesh as mesh_lib
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


@dataclasses.dataclass(frozen=True)
class _Chip:
  """What the mesh asks of a device."""

  id: int
  slice_index: int
  platform: str = 'tpu'
  device_kind: str = 'none that jax knows'
  process_index: int = 0
  core_on_chip: int = 0

  @property
  def coords(self) -> tuple[int, int, int]:
    return (self.id // 2, 0, 0)


# Two slices of four chips, listed in turns.
_CHIPS = [_Chip(id=i, slice_index=i % 2) for i in range(8)]


def test_slices_are_counted_on_tpu_only() -> None:
  assert mesh_lib.num_slices(_CHIPS) == 2
  assert mesh_lib.num_slices(_CHIPS[::2]) == 1
  assert mesh_lib.num_slices(jax.devices()) == 1
  gpus = [dataclasses.replace(chip, platform='gpu') for chip in _CHIPS]
  assert mesh_lib.num_slices(gpus) == 1  # one node each; fsdp may go across


def test_only_data_goes_across_slices() -> None:
  array = mesh_lib.across_slices((4, 1, 2), 2, _CHIPS)
  assert array.shape == (4, 1, 2)
  slices = [[chip.slice_index for chip in row.flat] for row in array]
  assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_slices_must_share_data_evenly() -> None:
  assert mesh_shape(_config(-1, 4, 1), 8, slices=2) == (2, 4, 1)
  assert mesh_shape(_config(4, -1, 1), 8, slices=2) == (4, 2, 1)
  with pytest.raises(ValueError, match=r'the 2 slices cannot share') as error:
    mesh_shape(_config(1, -1, 1), 8, slices=2)
  for words in ('puts 1 along data', 'a slice of 4', 'config.mesh.data to 2'):
    assert words in str(error.value)


def test_here_all_devices_are_one_slice() -> None:
  assert mesh_lib.shape_here(_config(-1, 2, 1)) == (
      jax.device_count() // 2,
      2,
      1,
  )


def test_a_process_that_is_alone_has_every_row() -> None:
  mesh = make_mesh(_config(2, 2, 2))
  np.testing.assert_array_equal(mesh_lib.own_rows(mesh, 12), range(12))
  rows = np.arange(36).reshape(12, 3)
  made = place({'x': rows, 'y': rows[:, 0]}, mesh, 12)
  same = place({'x': rows, 'y': rows[:, 0]}, mesh)
  for name, x in made.items():
    np.testing.assert_array_equal(x, same[name])
    assert x.sharding == same[name].sharding


def test_the_own_part_is_in_the_order_of_rows_whatever_the_layout() -> None:
  mesh = make_mesh(_config(2, 2, 2))
  rows = np.arange(24).reshape(8, 3)
  for spec in (('data', 'fsdp'), None, 'tensor', ('fsdp', 'data')):
    x = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(spec)))
    np.testing.assert_array_equal(mesh_lib.own_part(x, mesh), rows)
    np.testing.assert_array_equal(mesh_lib.gathered(x), rows)


@pytest.mark.parametrize(
    ('axes', 'mine', 'want'),
    [
        ((8, 1, 1), slice(4), [0, 1, 2, 3, 4, 5, 6, 7]),
        ((8, 1, 1), slice(4, 8), [8, 9, 10, 11, 12, 13, 14, 15]),
        ((2, 2, 2), slice(4, 8), [8, 9, 10, 11, 12, 13, 14, 15]),
        ((1, 2, 4), slice(4), [0, 1, 2, 3, 4, 5, 6, 7]),
        # Both hold all rows, each a half of every weight.
        ((1, 1, 8), slice(4), list(range(16))),
        # Devices that are no neighbours: rows with gaps.
        ((8, 1, 1), slice(0, 8, 4), [0, 1, 8, 9]),
    ],
)
def test_rows_of_a_process_are_those_of_its_devices(
    monkeypatch: pytest.MonkeyPatch, axes: tuple, mine: slice, want: list
) -> None:
  mesh = make_mesh(_config(*axes))
  devices, whole = jax.devices()[mine], NamedSharding.devices_indices_map
  monkeypatch.setattr(
      NamedSharding,
      'addressable_devices_indices_map',
      lambda self, shape: {
          d: at for d, at in whole(self, shape).items() if d in devices
      },
  )
  np.testing.assert_array_equal(mesh_lib.own_rows(mesh, 16), want)


def test_float32_matmuls_are_traced_with_the_precision_that_is_named() -> None:
  square = jax.jit(lambda x: x @ x)
  text = lambda: square.lower(np.ones((3, 3), np.float32)).as_text()
  for name in mesh_lib.PRECISIONS:
    with mesh_lib.matmul_precision(name):
      # The same function, which is not taken from the cache.
      assert f'[{name.upper()}, {name.upper()}]' in text()
  # What was set outside stays.
  with jax.default_matmul_precision('highest'):
    with mesh_lib.matmul_precision('default'):
      assert 'HIGHEST' in text()
