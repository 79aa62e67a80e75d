"""Logical axes -> mesh axes: one table for parameters and activations."""

import math
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec

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


def fitted(axes: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> Any:
  """`axes` without those that do not divide their dimension of `shape`."""
  kept = []
  for size, axis in zip(shape, tuple(axes), strict=False):
    names = axis if isinstance(axis, tuple) else (axis,)
    parts = math.prod(mesh.shape[name] for name in names if name)
    kept.append(axis if parts and size % parts == 0 else None)
  return PartitionSpec(*kept)


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
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  parts = math.prod(mesh.shape[axis] for axis in RULES['batch'])
  return parts if batch % parts == 0 else 1


def constrain_rows(x: Array) -> Array:
  """`x`, its first axis over the devices that share a batch."""
  return constrain(x, ('batch',) + (None,) * (x.ndim - 1))


def row_groups(batch: int, kv_heads: int) -> int:
  """Into how many parts the devices split the rows of a cache."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  parts = math.prod(mesh.shape[axis] for axis in cache_axes(batch, kv_heads)[0])
  return parts if batch % parts == 0 else 1


def split_cache(x: Array, *, stacked: bool = False) -> Array:
  """A cache [B, S, K, ...], or one [X, B, S, K, ...], over the devices."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  batch, _, heads = x.shape[stacked : stacked + 3]
  rows, split = cache_axes(batch, heads)
  axes = (None,) * stacked + (rows, None, split)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def beside_cache(x_BLNH: Array, kv_heads: int) -> Array:
  """Queries, or what attention makes of them, where their cache lies."""
  if jax.sharding.get_abstract_mesh().empty:
    return x_BLNH
  axes = cache_axes(x_BLNH.shape[0], kv_heads)
  spec_ = PartitionSpec(axes[0], None, axes[1])
  return jax.lax.with_sharding_constraint(x_BLNH, spec_)


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
