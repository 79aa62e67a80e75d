"""Tensors of files into sharded arrays, with no copy of a model in between.

Each parameter is made in its sharding and filled in place, one layer and one
block of rows at a time. A process reads what its own devices hold, and once
what several of them hold alike.

  their tensor of a layer: outputs x inputs
    +-------------+
    |    #####    |  <- a block: some outputs of a shard, by its inputs;
    |    #####    |     shard[layer, :, outputs] = block.T
    +-------------+
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from ma_rlhf_jax.models.tensor_names import Tensor, to_ours
from ma_rlhf_jax.structs import Array

# Reads the part of a tensor, named as in the files, that slices describe.
Read = Callable[[str, tuple[slice, ...]], np.ndarray]
# What a shard holds of a parameter: start and stop on each axis.
Extent = tuple[tuple[int, int], ...]


class Window(NamedTuple):
  """A block's place in a shard.

  Attributes:
    at: where it starts, on each axis.
    shape: its size on each axis; one layer.
  """

  at: tuple[int, ...]
  shape: tuple[int, ...]


def stream(
    read: Read, parts: Sequence[Tensor], target: jax.ShapeDtypeStruct
) -> Array:
  """One parameter, in the dtype and the sharding of `target`.

  Args:
    read: gives parts of tensors.
    parts: the tensors that make it up: one, or one a layer.
    target: without a sharding it goes to the default device.
  """
  if target.sharding is None:
    whole = tuple((0, size) for size in target.shape)
    return fill(read, parts, target, {None: whole})[0]
  indices = target.sharding.addressable_devices_indices_map(target.shape)
  extents = {
      device: tuple(
          s.indices(size)[:2]
          for s, size in zip(index, target.shape, strict=True)
      )
      for device, index in indices.items()
  }
  return jax.make_array_from_single_device_arrays(
      target.shape, target.sharding, fill(read, parts, target, extents)
  )


def fill(
    read: Read,
    parts: Sequence[Tensor],
    target: jax.ShapeDtypeStruct,
    extents: Mapping[jax.Device | None, Extent],
) -> list[Array]:
  """The shards of some devices, each an array on its device.

  Args:
    read: gives parts of tensors.
    parts: as in `stream`.
    target: shape and dtype of the whole parameter.
    extents: device -> its shard, all of one shape; None stands for the default
      device. Layers are not split.
  """
  shards = _SHARDS.get(_platform(extents), _OnDevices)(extents, target.dtype)
  block = shards.block_bytes // target.dtype.itemsize
  for tensor in parts:
    for window in _windows(shards.shape, tensor, block):
      blocks = {
          extent: read(
              tensor.name, _theirs(window, extent, target.shape, tensor)
          )
          for extent in set(extents.values())
      }
      shards.write(blocks, window, tensor.inputs)
  return shards.arrays()


def _platform(extents: Mapping[jax.Device | None, Extent]) -> str:
  device = next(iter(extents))
  if device is None:
    (device,) = jax.device_put(np.int32(0)).devices()
  return device.platform


def _windows(
    shard: tuple[int, ...], tensor: Tensor, block: int
) -> Iterator[Window]:
  """Cuts a layer of a shard along the first axis of their rows.

  Args:
    shard: its shape.
    tensor: theirs.
    block: values in a window, where one of their rows is no larger.
  """
  layer = [] if tensor.layer is None else [tensor.layer]
  at = layer + [0] * (len(shard) - len(layer))
  shape = [1] * len(layer) + list(shard[len(layer) :])
  axis = len(layer) + tensor.inputs
  if axis == len(shard):  # a head: all that they call a row
    yield Window(tuple(at), tuple(shape))
    return
  size = shape[axis]
  step = max(1, size * block // math.prod(shape))
  for start in range(0, size, step):
    at[axis], shape[axis] = start, min(step, size - start)
    yield Window(tuple(at), tuple(shape))


def _theirs(
    window: Window, extent: Extent, sizes: tuple[int, ...], tensor: Tensor
) -> tuple[slice, ...]:
  """What a window of a shard is of their tensor."""
  spans = [
      (start + a, start + a + n)
      for (start, _), a, n in zip(extent, window.at, window.shape, strict=True)
  ]
  if tensor.layer is not None:
    spans, sizes = spans[1:], sizes[1:]
  if not (i := tensor.inputs):
    return tuple(slice(*span) for span in spans)
  return _joined(spans[i:], sizes[i:]), _joined(spans[:i], sizes[:i])


def _joined(spans: Sequence[tuple[int, int]], sizes: tuple[int, ...]) -> slice:
  """Spans of several axes of ours, which are one axis of theirs."""
  if not spans:
    return slice(0, 1)
  if any(s != (0, size) for s, size in zip(spans[1:], sizes[1:], strict=True)):
    raise ValueError(
        f'{spans} of axes {sizes} is not one range; split the first axis of '
        'the inputs or of the outputs only'
    )
  stride = math.prod(sizes[1:])
  return slice(spans[0][0] * stride, spans[0][1] * stride)


def _shape(extents: Mapping[jax.Device | None, Extent]) -> tuple[int, ...]:
  return tuple(b - a for a, b in next(iter(extents.values())))


class _OnHost:
  """Shards in memory of the host, which the CPU backend takes as its own.

  Shards that are alike are one. XLA for CPU would update bfloat16 arrays by
  copying the whole of them through float32.
  """

  block_bytes = 2**18  # transposed within the cache: half the time of 2**23

  def __init__(
      self, extents: Mapping[jax.Device | None, Extent], dtype: np.dtype
  ) -> None:
    self.shape = _shape(extents)
    self._extents = extents
    self._buffers = {e: _aligned(self.shape, dtype) for e in extents.values()}

  def write(
      self, blocks: Mapping[Extent, np.ndarray], window: Window, inputs: int
  ) -> None:
    where = tuple(
        slice(a, a + n) for a, n in zip(window.at, window.shape, strict=True)
    )
    with np.errstate(over='ignore'):  # the reader tells of it
      for extent, block in blocks.items():
        self._buffers[extent][where] = to_ours(block, inputs, window.shape)

  def arrays(self) -> list[Array]:
    return [
        jax.device_put(self._buffers[extent], device)
        for device, extent in self._extents.items()
    ]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An array that starts where XLA wants it, so that it is not copied."""
  alignment = 64  # bytes
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + alignment, np.uint8)
  start = -raw.ctypes.data % alignment
  return raw[start : start + size].view(dtype).reshape(shape)


class _OnDevices:
  """Shards on accelerators, filled by updates that are done in place.

  The devices of this process make up a mesh of one axis, so that one program
  serves all of them, and processes need not wait for each other.
  """

  block_bytes = 2**23  # on each device; few transfers, little memory

  def __init__(
      self, extents: Mapping[jax.Device | None, Extent], dtype: np.dtype
  ) -> None:
    self.shape = _shape(extents)
    self._extents = extents
    self._split = None
    if None not in extents:
      mesh = Mesh(np.array(list(extents)), ('devices',))
      self._split = NamedSharding(mesh, PartitionSpec('devices'))
    shape = (len(extents) * self.shape[0], *self.shape[1:])
    self._buffer = jnp.zeros(shape, dtype, device=self._split)

  def write(
      self, blocks: Mapping[Extent, np.ndarray], window: Window, inputs: int
  ) -> None:
    on_devices = [
        jax.device_put(blocks[extent], device)
        for device, extent in self._extents.items()
    ]
    where = np.array(window.at, np.int32), inputs, window.shape
    if self._split is None:
      self._buffer = _update(self._buffer, *on_devices, *where)
    else:
      rows, *columns = on_devices[0].shape
      block = jax.make_array_from_single_device_arrays(
          (len(on_devices) * rows, *columns), self._split, on_devices
      )
      with jax.set_mesh(self._split.mesh):
        self._buffer = _update_all(self._buffer, block, *where)
    self._buffer.block_until_ready()  # else blocks pile up on the host

  def arrays(self) -> list[Array]:
    if self._split is None:
      return [self._buffer]
    return [shard.data for shard in self._buffer.addressable_shards]


def _updated(
    buffer: Array, block: Array, at: Array, inputs: int, shape: tuple[int, ...]
) -> Array:
  """The shard with a block of theirs, which has `shape` in our layout."""
  ours = to_ours(block, inputs, shape).astype(buffer.dtype)
  return jax.lax.dynamic_update_slice(buffer, ours, tuple(at))


def _all_updated(
    buffer: Array, block: Array, at: Array, inputs: int, shape: tuple[int, ...]
) -> Array:
  """The same on each device of the mesh of `jax.set_mesh`."""
  split = PartitionSpec('devices')
  return jax.shard_map(
      functools.partial(_updated, inputs=inputs, shape=shape),
      in_specs=(split, split, PartitionSpec()),
      out_specs=split,
  )(buffer, block, at)


_update, _update_all = (
    jax.jit(f, donate_argnums=0, static_argnums=(3, 4))
    for f in (_updated, _all_updated)
)
# Platform -> how its shards are filled; all others do it on the devices.
_SHARDS = {'cpu': _OnHost}
