"""Where arrays lie on the mesh: the one table of parameters and activations.

A parameter's path gives the logical names of its axes (`PARAMS`), a logical
name gives mesh axes (`RULES`). Activations name their axes where they are
constrained.
"""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ma_rlhf_jax.structs import Array, Params

Axes = tuple[str | None, ...]

# Logical axis -> mesh axes that split it; None = nothing does.
RULES = {
    'batch': ('data', 'fsdp'),
    'vocab': 'tensor',
    'embed': 'fsdp',
    'mlp': 'tensor',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'head': None,
    'norm': None,
    'rank': None,
    'layers': None,
    'length': None,
    'width': None,
}

# Axes that stay whole where the mesh does not divide them: one key head serves
# the query heads of all devices.
_MAY_STAY_WHOLE = ('kv_heads',)

# Last part of a parameter's path -> its axes, those that are summed over in a
# product apart from those of the result. What lies below `layers/` has an axis
# of layers before them.
PARAMS: dict[str, tuple[Axes, Axes]] = {
    'embedding': ((), ('vocab', 'embed')),
    'query': (('embed',), ('heads', 'head')),
    'key': (('embed',), ('kv_heads', 'head')),
    'value': (('embed',), ('kv_heads', 'head')),
    'out': (('heads', 'head'), ('embed',)),
    'gate': (('embed',), ('mlp',)),
    'up': (('embed',), ('mlp',)),
    'down': (('mlp',), ('embed',)),
    'scale': ((), ('norm',)),
    'head': (('embed',), ()),
}

# What the two parameters of an adapter add to the name of their kernel.
LORA_A, LORA_B = '_lora_a', '_lora_b'


def param_axes(path: str) -> Axes:
  """Logical axes of a parameter, such as 'layers/mlp/up' or 'head'.

  Raises:
    KeyError: if `PARAMS` has none of that name.
  """
  name = path.rpartition('/')[2]
  inputs, outputs = PARAMS[name.removesuffix(LORA_A).removesuffix(LORA_B)]
  if name.endswith(LORA_A):
    outputs = ('rank',)
  if name.endswith(LORA_B):
    inputs = ('rank',)
  layers = ('layers',) if 'layers/' in path else ()
  return layers + inputs + outputs


def spec(axes: Axes) -> PartitionSpec:
  """The partition spec of an array with these logical axes."""
  return PartitionSpec(*(None if a is None else RULES[a] for a in axes))


def param_spec(
    path: str,
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    *,
    decoding: bool = False,
) -> PartitionSpec:
  """The partition spec of a parameter; its axes that may stay whole, may.

  Args:
    path: of the parameter.
    shape: of the parameter.
    mesh: over whose axes.
    decoding: over `tensor` alone, so that no token waits for a gather.
  """

  def split(axis: str, size: int) -> Any:
    over = None if decoding and RULES[axis] == 'fsdp' else RULES[axis]
    names = (over,) if isinstance(over, str) else over or ()
    parts = math.prod(mesh.shape[name] for name in names)
    return None if axis in _MAY_STAY_WHOLE and size % parts else over

  return PartitionSpec(*map(split, param_axes(path), shape))


def current_mesh() -> AbstractMesh | None:
  """The mesh of `jax.set_mesh`; None without one, or with one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': of the mesh of `jax.set_mesh`, else the default.

  A mesh may stand for devices that are not here, to compile for them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  name = device.platform if device else jax.default_backend()
  return 'gpu' if name in ('cuda', 'rocm') else name


class Machine(NamedTuple):
  """What kernels ask of the devices of a program.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    capability: CUDA compute capability, as (8, 9) for 8.9; of several GPUs the
      lowest. None where there is none, as on AMD's GPUs.
  """

  platform: str
  capability: tuple[int, int] | None = None


def machine() -> Machine:
  """The devices of `platform`; a GPU is asked for its capability."""
  name = platform()
  if name != 'gpu':
    return Machine(name)
  # All processes must trace the same program, so all devices are asked.
  told = [getattr(d, 'compute_capability', None) for d in jax.devices('gpu')]
  found = [re.fullmatch(r'(\d+)\.(\d+)', str(text)) for text in told]
  if not all(found):
    return Machine(name)
  return Machine(name, min((int(m[1]), int(m[2])) for m in found))


def cache_axes(batch: int, kv_heads: int) -> tuple[Any, Any]:
  """Mesh axes of the rows and of the heads of a cache under the current mesh.

  Its heads lie with the query heads that read them. A single head cannot be
  split: then `tensor` splits the rows too.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rows, tensor = RULES['batch'], mesh.shape['tensor']
  if kv_heads % tensor == 0:
    return rows, 'tensor'
  everything = (*rows, 'tensor')
  parts = math.prod(mesh.shape[axis] for axis in everything)
  return (everything if batch % parts == 0 else rows), None


def batch_groups(batch: int) -> int:
  """Into how many parts the devices split the rows of a batch."""
  mesh = current_mesh()
  if mesh is None:
    return 1
  parts = math.prod(mesh.shape[axis] for axis in RULES['batch'])
  return parts if batch % parts == 0 else 1


def constrain_rows(x: Array) -> Array:
  """`x`, its first axis over the devices that share a batch."""
  return constrain(x, ('batch',) + (None,) * (x.ndim - 1))


def row_groups(batch: int, kv_heads: int) -> int:
  """Into how many parts the devices split the rows of a cache."""
  mesh = current_mesh()
  if mesh is None:
    return 1
  parts = math.prod(mesh.shape[axis] for axis in cache_axes(batch, kv_heads)[0])
  return parts if batch % parts == 0 else 1


def split_cache(x: Array, *, stacked: bool = False) -> Array:
  """A cache [B, S, K, ...], or one [X, B, S, K, ...], over the devices."""
  if current_mesh() is None:
    return x
  batch, _, heads = x.shape[stacked : stacked + 3]
  rows, split = cache_axes(batch, heads)
  axes = (None,) * stacked + (rows, None, split)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def beside_cache(x_BLNH: Array, kv_heads: int) -> Array:
  """Queries, or what attention makes of them, where their cache lies."""
  if current_mesh() is None:
    return x_BLNH
  axes = cache_axes(x_BLNH.shape[0], kv_heads)
  spec_ = PartitionSpec(axes[0], None, axes[1])
  return jax.lax.with_sharding_constraint(x_BLNH, spec_)


def constrain(x: Array, axes: Axes) -> Array:
  """`x`, laid out as `RULES` says under the mesh of `jax.set_mesh`."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes))


def _with_paths(function: Any, tree: Params) -> Params:
  """`function(path, leaf)` of every leaf, parts of paths joined by '/'."""
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return jax.tree_util.tree_map_with_path(
      lambda path, x: function(name(path), x), tree
  )


def param_shardings(params: Params, mesh: Mesh | None = None) -> Params:
  """Shardings of parameters; None without a mesh.

  Args:
    params: anything with shapes, by path: a model's, or some of them.
    mesh: whose devices need not be here; None = that of `jax.set_mesh`.
  """
  mesh = mesh or jax.sharding.get_mesh()
  if mesh.empty:
    return jax.tree.map(lambda _: None, params)
  return _with_paths(
      lambda path, x: NamedSharding(mesh, param_spec(path, x.shape, mesh)),
      params,
  )


def constrain_params(params: Params) -> Params:
  """`params`, or gradients of such, laid out as `param_shardings` says."""
  mesh = current_mesh()
  if mesh is None:
    return params
  return _with_paths(
      lambda path, x: jax.lax.with_sharding_constraint(
          x, param_spec(path, x.shape, mesh)
      ),
      params,
  )


# Where parameters that do not learn may wait: field value -> memory kind.
MEMORIES = {'device': '', 'host': 'pinned_host'}


def has_host_memory() -> bool:
  """Whether programs for the default devices can read arrays on the host."""
  kinds = {m.kind for m in jax.local_devices()[0].addressable_memories()}
  return MEMORIES['host'] in kinds


def in_memory(params: Params, memory: str) -> Params:
  """`params`, arrays or shapes of such, in a memory of `MEMORIES`.

  A program that gets them on the host calls `on_device` first.
  """
  kind = MEMORIES[memory]

  def put(x: Any) -> Any:
    if not kind or x.sharding is None:
      return x
    sharding = x.sharding.with_memory_kind(kind)
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.device_put(x, sharding)

  return jax.tree.map(put, params)


def on_device(tree: Any) -> Any:
  """Under jit: what lies on the host, copied to the devices; else as it is."""
  space = jax.memory.Space

  def put(x: Array) -> Array:
    if jax.typeof(x).memory_space == space.Host:
      return jax.device_put(x, space.Device)
    return x

  return jax.tree.map(put, tree)


def indivisible(abstract: Any) -> list[str]:
  """The arrays that their mesh cannot split evenly, one line each.

  Args:
    abstract: a tree of `jax.ShapeDtypeStruct` with shardings.
  """
  found = []
  for path, x in jax.tree_util.tree_leaves_with_path(abstract):
    try:
      if x.sharding is not None:
        x.sharding.shard_shape(x.shape)
    except ValueError:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      found.append(f'{name} of shape {x.shape} by {x.sharding.spec}')
  return found


def micro_batches(tree: Any, num: int) -> Any:
  """Splits the rows of every array into `num` micro-batches.

  Micro-batch j holds rows j, num + j, 2 num + j, ...: each device keeps its
  own rows, so nothing moves between devices.

  Args:
    tree: arrays [B, ...].
    num: divides B.

  Returns:
    The same tree of arrays [num, B / num, ...].
  """
  split = lambda x: x.reshape(-1, num, *x.shape[1:]).swapaxes(0, 1)
  return jax.tree.map(split, tree)


def merge_micro_batches(tree: Any) -> Any:
  """The inverse of `micro_batches`."""
  merge = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
  return jax.tree.map(merge, tree)
