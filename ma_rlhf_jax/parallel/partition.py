"""Logical axes -> mesh axes: one table for parameters and activations."""

from typing import Any

from flax import linen as nn
import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from ma_rlhf_jax.structs import Array

# Parameters name their axes where they are created (models/); activations
# where they are constrained. An axis that is not listed is not split.
RULES = {
    'batch': ('data', 'fsdp'),
    'vocab': 'tensor',
    'embed': 'fsdp',
    'mlp': 'tensor',
    'heads': 'tensor',
    'kv_heads': None,
    'head': None,
    'norm': None,
    'rank': None,
    'layers': None,
    'length': None,
    'width': None,
}


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
  """The partition spec of an array with these logical axes."""
  return PartitionSpec(*(None if a is None else RULES[a] for a in axes))


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


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
  """`x`, laid out as `RULES` says under the mesh of `jax.set_mesh`."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes))


def logical_shardings(boxed: Any) -> Any:
  """Shardings of boxed parameters under the current mesh; None without one."""
  specs = nn.get_partition_spec(boxed)
  is_spec = lambda x: isinstance(x, PartitionSpec)
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return jax.tree.map(lambda _: None, specs, is_leaf=is_spec)
  return jax.tree.map(
      lambda axes: NamedSharding(mesh, spec(axes)), specs, is_leaf=is_spec
  )


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
