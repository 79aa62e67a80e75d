"""The device mesh; host batches onto it, and arrays back from it."""

from collections.abc import Iterator, Sequence
import contextlib
from typing import Any

import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax.structs import Array

AXES = ('data', 'fsdp', 'tensor')
# How exactly two float32 matrices are multiplied. `default` is left to jax and
# the platform.
PRECISIONS = ('default', 'high', 'highest')
_ROWS = PartitionSpec(('data', 'fsdp'))


def num_slices(devices: Sequence[jax.Device]) -> int:
  """How many TPU slices, which only the data-centre network joins.

  1 on other platforms, whose devices are numbered host by host.
  """
  if devices[0].platform != 'tpu':
    return 1
  return len({device.slice_index for device in devices})


def mesh_shape(
    mesh: ConfigDict, num_devices: int, slices: int = 1
) -> tuple[int, ...]:
  """Devices along (data, fsdp, tensor); one axis may be -1, "all left".

  Args:
    mesh: `config.mesh`.
    num_devices: in all slices.
    slices: see `num_slices`; only `data` goes across.

  Raises:
    ValueError: when the axes do not multiply to the number of devices, or the
      slices cannot share `data`.
  """
  shape = [mesh[axis] for axis in AXES]
  fixed = int(np.prod([n for n in shape if n != -1]))
  if shape.count(-1) == 1 and fixed > 0 and num_devices % fixed == 0:
    shape[shape.index(-1)] = num_devices // fixed
  asked = tuple(mesh[a] for a in AXES)
  if -1 in shape or int(np.prod(shape)) != num_devices:
    raise ValueError(
        f'mesh (data, fsdp, tensor) = {asked} does not '
        f'cover the {num_devices} devices; set one of config.mesh.data, .fsdp, '
        '.tensor to -1 or make their product equal to that number (data=1, '
        'fsdp=-1, tensor=1 serves any)'
    )
  if shape[0] % slices:
    raise ValueError(
        f'mesh (data, fsdp, tensor) = {asked} puts {shape[0]} along data, '
        f'which the {slices} slices cannot share evenly; fsdp and tensor stay '
        f'within a slice of {num_devices // slices} devices, so set '
        f'config.mesh.data to {slices} or a multiple of it'
    )
  return tuple(shape)


def shape_here(mesh: ConfigDict) -> tuple[int, ...]:
  """`mesh_shape` for all devices of all processes."""
  devices = jax.devices()
  return mesh_shape(mesh, len(devices), num_slices(devices))


def make_mesh(mesh: ConfigDict) -> Mesh:
  """The mesh over all devices that `config.mesh` describes."""
  shape, types = shape_here(mesh), (AxisType.Auto,) * len(AXES)
  slices = num_slices(jax.devices())
  if slices == 1:
    return jax.make_mesh(shape, AXES, axis_types=types)
  return Mesh(across_slices(shape, slices, jax.devices()), AXES, types)


def across_slices(
    shape: tuple[int, ...], slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
  """Devices [data, fsdp, tensor]; slice s has a block of data of its own."""
  within = (shape[0] // slices, *shape[1:])
  return mesh_utils.create_hybrid_device_mesh(
      within, (slices, 1, 1), devices, allow_split_physical_axes=True
  )


def check_decode(shape: tuple[int, ...], tensor: int) -> None:
  """Raises ValueError unless `tensor` divides fsdp * tensor of a mesh."""
  _, fsdp, split = shape
  if tensor < 1 or fsdp * split % tensor:
    raise ValueError(
        f'rollout.tensor={tensor} must divide the {fsdp * split} devices of '
        'mesh.fsdp * mesh.tensor; 0 chooses'
    )


def decode_mesh(mesh: Mesh, tensor: int) -> Mesh:
  """The same devices, `tensor` of them to one copy of the weights.

  Args:
    mesh: of training.
    tensor: divides fsdp * tensor of `mesh`.

  Raises:
    ValueError: if it does not.
  """
  check_decode(mesh.devices.shape, tensor)
  data, fsdp, split = mesh.devices.shape
  shape = (data, fsdp * split // tensor, tensor)
  types = (AxisType.Auto,) * len(AXES)
  return Mesh(mesh.devices.reshape(shape), AXES, axis_types=types)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
  """Inside, programs are traced with this precision of float32 matmuls.

  Args:
    name: one of `PRECISIONS`, see `config.model.matmul_precision`.
  """
  if name == 'default':
    yield
    return
  with jax.default_matmul_precision(name):
    yield


def abstract(batch: Any, mesh: Mesh) -> Any:
  """Shapes, dtypes and shardings of what `place` would give."""
  sharding = NamedSharding(mesh, _ROWS)
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch
  )


def own_rows(mesh: Mesh, total: int) -> np.ndarray:
  """int64: which rows of a batch lie on this process's devices, ascending.

  Args:
    mesh: over the devices of all processes.
    total: rows of the batch.
  """
  shards = NamedSharding(mesh, _ROWS).addressable_devices_indices_map((total,))
  spans = {rows.indices(total)[:2] for (rows,) in shards.values()}
  return np.concatenate([np.arange(*span) for span in sorted(spans)])


def place(batch: Any, mesh: Mesh, total: int | None = None) -> Any:
  """Host arrays onto the devices, rows over `data` and `fsdp`.

  Args:
    batch: arrays of `own_rows(mesh, total)`, or of all rows where every device
      is this process's.
    mesh: over the devices of all processes.
    total: rows of the whole batch; None = those of `batch`.
  """
  sharding = NamedSharding(mesh, _ROWS)
  if total is None:
    return jax.tree.map(lambda x: jax.device_put(x, sharding), batch)
  own = own_rows(mesh, total)

  def put(x: np.ndarray) -> Array:
    part = lambda at: x[np.searchsorted(own, np.arange(total)[at[0]])]
    return jax.make_array_from_callback((total, *x.shape[1:]), sharding, part)

  return jax.tree.map(put, batch)


def own_part(x: Array, mesh: Mesh) -> np.ndarray:
  """On the host: the rows of an array over `mesh` that `own_rows` counts."""
  sharding = NamedSharding(mesh, _ROWS)
  if not x.sharding.is_equivalent_to(sharding, x.ndim):
    x = jax.jit(lambda x: x, out_shardings=sharding)(x)
  parts = {s.index[0].indices(len(x))[0]: s.data for s in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def gathered(x: Any) -> np.ndarray:
  """`x` on the host, whole; every process must call this."""
  if isinstance(x, jax.Array) and not (
      x.is_fully_addressable or x.is_fully_replicated
  ):
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)
