"""What stays on a device through a stage, and what a program adds to it."""

import collections
import math
from typing import Any

import jax

Leaves = list[jax.ShapeDtypeStruct]


def device_bytes(x: Any) -> int:
  """HBM of one device that an abstract array takes, without padding."""
  shape, sharding = x.shape, getattr(x, 'sharding', None)
  if sharding is not None:
    if sharding.memory_kind == 'pinned_host':
      return 0
    shape = sharding.shard_shape(shape)
  itemsize = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else 0
  return math.prod(shape) * (itemsize or x.dtype.itemsize)


def _abstract(tree: Any) -> Leaves:
  leaves = jax.tree.leaves(tree)
  return [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]


def residents(programs: Any) -> dict[str, Leaves]:
  """Arrays that a stage holds from its first to its last update, by model.

  What models share is counted with one that only scores, if there is one.

  Args:
    programs: of the stage, made of abstract parameters.
  """
  found: dict[str, Leaves] = {}
  seen: set[int] = set()

  def add(name: str, tree: Any) -> None:
    new = [x for x in _abstract(tree) if id(x) not in seen]
    seen.update(map(id, new))
    if new:
      found[name] = found.get(name, []) + new

  for name, state in programs.abstract_states.items():
    add(name, state)
  if not hasattr(programs, 'fixed'):  # one model, of SFT or the reward model
    add(next(iter(found)), programs.frozen)
    return found
  for name, tree in programs.fixed._asdict().items():
    add(name, tree)
  for name, tree in programs.frozen.items():
    add(name, tree)
  return found


def sizes(found: dict[str, Leaves]) -> dict[str, int]:
  """Bytes of one device by model."""
  return {name: sum(map(device_bytes, x)) for name, x in found.items()}


def _signature(x: Any) -> tuple:
  spec = getattr(getattr(x, 'sharding', None), 'spec', None)
  return x.shape, str(x.dtype), str(spec)


def beside(args: Any, found: dict[str, Leaves]) -> tuple[int, int]:
  """(bytes of resident arguments, bytes of the others) of one device.

  Arrays are told apart by shape, type and sharding, since a program is given
  copies of their descriptions.
  """
  resident = {_signature(x) for leaves in found.values() for x in leaves}
  sums = collections.Counter()
  for x in _abstract(args):
    sums[_signature(x) in resident and bool(x.shape)] += device_bytes(x)
  return sums[True], sums[False]
