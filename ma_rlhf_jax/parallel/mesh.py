"""The device mesh, and placing host batches on it."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
import numpy as np

AXES = ('data', 'fsdp', 'tensor')


def mesh_shape(mesh: ConfigDict, num_devices: int) -> tuple[int, ...]:
  """Devices along (data, fsdp, tensor); one axis may be -1, "all left".

  Raises:
    ValueError: when the axes do not multiply to the number of devices.
  """
  shape = [mesh[axis] for axis in AXES]
  fixed = int(np.prod([n for n in shape if n != -1]))
  if shape.count(-1) == 1 and fixed > 0 and num_devices % fixed == 0:
    shape[shape.index(-1)] = num_devices // fixed
  if -1 in shape or int(np.prod(shape)) != num_devices:
    raise ValueError(
        f'mesh (data, fsdp, tensor) = {tuple(mesh[a] for a in AXES)} does not '
        f'cover the {num_devices} devices; set one of config.mesh.data, .fsdp, '
        '.tensor to -1 or make their product equal to that number'
    )
  return tuple(shape)


def make_mesh(mesh: ConfigDict) -> Mesh:
  """The mesh over all devices that `config.mesh` describes."""
  shape = mesh_shape(mesh, jax.device_count())
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def decode_mesh(mesh: Mesh, tensor: int) -> Mesh:
  """The same devices, `tensor` of them to one copy of the weights.

  Args:
    mesh: of training.
    tensor: divides fsdp * tensor of `mesh`.
  """
  data, fsdp, split = mesh.devices.shape
  shape = (data, fsdp * split // tensor, tensor)
  types = (AxisType.Auto,) * len(AXES)
  return Mesh(mesh.devices.reshape(shape), AXES, axis_types=types)


def abstract(batch: Any, mesh: Mesh) -> Any:
  """Shapes, dtypes and shardings of what `place` would give."""
  sharding = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch
  )


def place(batch: Any, mesh: Mesh) -> Any:
  """Host arrays onto the devices, rows over `data` and `fsdp`."""
  sharding = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
  return jax.tree.map(lambda x: jax.device_put(x, sharding), batch)
