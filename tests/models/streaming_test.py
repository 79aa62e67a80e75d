"""Tests of `models.streaming`."""

from collections import Counter
import dataclasses

from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from ma_rlhf_jax.models import heads, streaming, tensor_names
from ma_rlhf_jax.structs import Array, Params
from tests.models.drawn import (
    UNUSUAL_2,
    assert_same_bits,
    draw,
    their_tensors,
)

CONFIG = dataclasses.replace(UNUSUAL_2, kernel_dtype='bfloat16')
PARAMS = draw('scalar', CONFIG, seed=3)
TENSORS = their_tensors('scalar', CONFIG, PARAMS)
WANTED = tensor_names.list_tensors('scalar', CONFIG)


def _mesh(*shape: int) -> jax.sharding.Mesh:
  names = ('data', 'fsdp', 'tensor')
  return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3)


def _read(name: str, where: tuple[slice, ...]) -> np.ndarray:
  return TENSORS[name][where]


def _targets() -> dict[str, jax.ShapeDtypeStruct]:
  abstract = heads.abstract_params('scalar', CONFIG)
  return traverse_util.flatten_dict(abstract, sep='/')


def _parts(path: str) -> list[tensor_names.Tensor]:
  return [t for t in WANTED if t.path == path]


def _stream_all() -> Params:
  return traverse_util.unflatten_dict(
      {
          path: streaming.stream(_read, _parts(path), target)
          for path, target in _targets().items()
      },
      sep='/',
  )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
  for kind in (streaming._OnHost, streaming._OnDevices):
    monkeypatch.setattr(kind, 'block_bytes', 700)  # up to 23 a layer


@pytest.fixture
def on_devices(monkeypatch: pytest.MonkeyPatch) -> None:
  """As on an accelerator."""
  monkeypatch.delitem(streaming._SHARDS, 'cpu')


@pytest.mark.parametrize(
    'shape', [(8, 1, 1), (1, 8, 1), (2, 1, 4), (1, 2, 4), (2, 2, 2)]
)
@pytest.mark.usefixtures('small_blocks')
def test_all_shardings_give_the_same_bits(shape: tuple[int, ...]) -> None:
  with jax.set_mesh(_mesh(*shape)):
    found = _stream_all()
    targets = heads.abstract_params('scalar', CONFIG)
  assert_same_bits(PARAMS, found)
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(targets), strict=True)
  assert all(x.sharding == y.sharding for x, y in pairs)


@pytest.mark.usefixtures('on_devices')
def test_shards_filled_on_devices_have_the_same_bits() -> None:
  with jax.set_mesh(_mesh(2, 2, 2)):
    found = _stream_all()
    targets = heads.abstract_params('scalar', CONFIG)
  assert_same_bits(PARAMS, found)
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(targets), strict=True)
  assert all(x.sharding == y.sharding for x, y in pairs)


@pytest.mark.parametrize('path', ['backbone/embedding', 'head'])
@pytest.mark.usefixtures('on_devices', 'small_blocks')
def test_blocks_on_one_device_have_the_same_bits(path: str) -> None:
  found = streaming.stream(_read, _parts(path), _targets()[path])
  want = traverse_util.flatten_dict(PARAMS, sep='/')[path]
  assert_same_bits(want, found)


def test_without_a_mesh_arrays_are_bound_to_no_device() -> None:
  found = jax.tree.leaves(_stream_all())
  assert_same_bits(jax.tree.leaves(PARAMS), found)
  assert not any(x.committed for x in found)


def test_every_pattern_of_bits_arrives() -> None:
  # All numbers of bfloat16, the smallest too, 256 of each sign a row.
  bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
  bits = bits[(np.arange(256) & 0x7F) != 0x7F]  # no nan and no infinity
  assert bits.shape == (254, 256)
  tensor = tensor_names.Tensor('x', bits.shape, 'x', 0, 1)
  found = streaming.stream(
      lambda _, where: bits.view(jnp.bfloat16)[where],
      [tensor],
      jax.ShapeDtypeStruct((1, 256, 254), jnp.bfloat16),
  )
  np.testing.assert_array_equal(np.asarray(found[0]).view(np.uint16), bits.T)


@pytest.mark.parametrize('dtype', [np.float16, np.float64, jnp.bfloat16])
@pytest.mark.parametrize('host', [True, False])
def test_values_are_rounded_once(
    dtype: type, host: bool, request: pytest.FixtureRequest
) -> None:
  if not host:
    request.getfixturevalue('on_devices')
  theirs = np.random.default_rng(0).normal(size=(6, 4)).astype(dtype)
  tensor = tensor_names.Tensor('x', (6, 4), 'x', None, 1)
  target = jax.ShapeDtypeStruct((4, 2, 3), jnp.float32)
  found = streaming.stream(lambda _, w: theirs[w], [tensor], target)
  want = theirs.astype(np.float32).T.reshape(4, 2, 3)
  np.testing.assert_array_equal(found, want)


class _Counting:
  """Reads, and counts the bytes that each tensor was asked for."""

  def __init__(self) -> None:
    self.bytes, self.largest = Counter(), 0

  def __call__(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
    part = TENSORS[name][where]
    self.bytes[name] += part.nbytes
    self.largest = max(self.largest, part.nbytes)
    return part


def _fill(devices: slice) -> tuple[_Counting, dict[str, list[Array]]]:
  """What some of the eight devices get, as if the process had no others."""
  reader, found = _Counting(), {}
  for path, target in _targets().items():
    indices = target.sharding.devices_indices_map(target.shape)
    extents = {
        device: tuple(
            s.indices(n)[:2] for s, n in zip(index, target.shape, strict=True)
        )
        for device, index in list(indices.items())[devices]
    }
    found[path] = streaming.fill(reader, _parts(path), target, extents)
  return reader, found


@pytest.mark.parametrize(('first', 'last'), [(2, 4), (7, 8)])
def test_a_process_reads_the_bytes_of_its_own_shards(
    first: int, last: int
) -> None:
  with jax.set_mesh(_mesh(1, 8, 1)):  # splits the width of every matrix
    reader, found = _fill(slice(first, last))
  for tensor in WANTED:
    share = 1 if tensor.path.endswith('scale') else (last - first) / 8
    want = TENSORS[tensor.name].nbytes * share
    assert reader.bytes[tensor.name] == want, tensor.name
  head = np.asarray(PARAMS['head'])[3 * first : 3 * last]
  np.testing.assert_array_equal(np.concatenate(found['head']), head)


@pytest.mark.usefixtures('small_blocks')
def test_equal_shards_are_read_once_and_in_small_blocks() -> None:
  with jax.set_mesh(_mesh(2, 2, 2)):
    reader, _ = _fill(slice(0, 8))
  assert reader.bytes == {name: x.nbytes for name, x in TENSORS.items()}
  # One head of one tensor: 10 rows of 12 float32; no block needs be larger.
  assert 350 < reader.largest <= 700


def test_host_memory_becomes_the_array() -> None:
  extents = {device: ((0, 5), (0, 3)) for device in jax.devices()[:2]}
  shards = streaming._OnHost(extents, np.dtype(np.float32))
  block = np.arange(6, dtype=np.float32).reshape(3, 2)
  window = streaming.Window((1, 0), (2, 3))
  shards.write({((0, 5), (0, 3)): block}, window, 1)
  arrays = shards.arrays()
  (buffer,) = shards._buffers.values()
  assert {x.unsafe_buffer_pointer() for x in arrays} == {buffer.ctypes.data}
  # The first to be donated leaves the second as it is.
  doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(arrays[0])
  np.testing.assert_array_equal(doubled[1:3], 2 * block.T)
  np.testing.assert_array_equal(arrays[1][1:3], block.T)


@pytest.mark.parametrize('num_devices', [0, 2])
def test_devices_are_written_in_place(num_devices: int) -> None:
  devices = jax.devices()[:num_devices] or [None]
  extents = {device: ((0, 5), (0, 3)) for device in devices}
  shards = streaming._OnDevices(extents, np.dtype(np.float32))
  pointers = lambda: [x.unsafe_buffer_pointer() for x in shards.arrays()]
  before = pointers()
  block = np.arange(6, dtype=np.float32).reshape(3, 2)
  for row in (1, 3):
    window = streaming.Window((row, 0), (2, 3))
    shards.write({((0, 5), (0, 3)): block}, window, 1)
  assert pointers() == before
  for array in shards.arrays():
    want = np.concatenate([np.zeros((1, 3)), block.T, block.T])
    np.testing.assert_array_equal(array, want)


def test_windows_cover_a_layer_once() -> None:
  tensor = tensor_names.Tensor('x', (20, 24), 'x', layer=1, inputs=1)
  covered = np.zeros((3, 24, 4, 5), int)
  windows = list(streaming._windows(covered.shape, tensor, 700 // 4))
  # 24 inputs by 5 float32 are 480 bytes: no two heads fit into 700.
  assert len(windows) == 4
  for at, shape in windows:
    assert shape == (1, 24, 1, 5)
    covered[tuple(slice(a, a + n) for a, n in zip(at, shape, strict=True))] += 1
  assert (covered[1] == 1).all() and (covered[[0, 2]] == 0).all()


def test_what_is_no_range_of_theirs_is_refused() -> None:
  spec = PartitionSpec(None, None, None, 'fsdp')  # the inside of each head
  target = jax.ShapeDtypeStruct(
      (3, 24, 4, 10), np.float32, sharding=NamedSharding(_mesh(1, 2, 4), spec)
  )
  with pytest.raises(ValueError, match='split the first axis'):
    streaming.stream(_read, _parts('backbone/layers/attention/query'), target)
