"""Bytes that a compiled program moves: between chips, and to and from HBM."""

from collections.abc import Iterator
import dataclasses
import math
import re

from ma_rlhf_jax.planning import hlo
from ma_rlhf_jax.planning import loops as loops_lib

# Bytes that pass a device for one byte of the larger of operand and result,
# with n devices: rings, which no algorithm beats for large arrays.
_WIRE = {
    'all-gather': lambda n: (n - 1) / n,
    'reduce-scatter': lambda n: (n - 1) / n,
    'all-reduce': lambda n: 2 * (n - 1) / n,
    'all-to-all': lambda n: (n - 1) / n,
    'ragged-all-to-all': lambda n: (n - 1) / n,
    'collective-permute': lambda n: 1.0,
    'collective-broadcast': lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One communication between devices.

  Attributes:
    kind: key of `_WIRE`.
    arrays: results on one device.
    group: devices that take part.
    wire: bytes that pass a device each time.
    loops: around it.
    op_name: the part of the program that asked for it.
    beside: whether the program goes on while it is under way.
  """

  kind: str
  arrays: tuple[hlo.Array, ...]
  group: int
  wire: float
  loops: tuple[loops_lib.Loop, ...]
  op_name: str
  beside: bool = False

  @property
  def waits(self) -> int:
    """How often the program waits for it. A token has little to go on with."""
    return 0 if self.beside and not self.in_decode_loop else self.count

  @property
  def rounds(self) -> int:
    """How often something crosses the group each time."""
    return 2 if self.kind == 'all-reduce' else 1

  @property
  def count(self) -> int:
    """How often it runs."""
    return loops_lib.trips(self.loops)

  @property
  def in_decode_loop(self) -> bool:
    """Whether a loop around it may end early, as that over tokens does."""
    return any(loop.may_end_early for loop in self.loops)

  @property
  def total(self) -> float:
    """Bytes that pass a device in all."""
    return self.wire * self.count


def _group(rest: str) -> int:
  """How many devices a collective joins; 2 for pairs."""
  named = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', rest)
  if named:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
    axes = re.findall(r"'([^']+)'", named.group(2))
    return math.prod(int(sizes.get(axis, 1)) for axis in axes)
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]', rest)
  if iota:
    return int(iota.group(2))
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', rest)
  return len(listed.group(1).split(',')) if listed else 2


def _kind(opcode: str) -> str | None:
  name = opcode.removesuffix('-start')
  return name if name in _WIRE else None


def _collective(
    made: hlo.Instruction,
    loops: tuple[loops_lib.Loop, ...],
    *,
    scatters: bool,
    beside: bool,
) -> Collective:
  kind, arrays = _kind(made.opcode), made.arrays
  if made.opcode.endswith('-start') and kind != 'all-reduce':
    arrays = (max(arrays, key=lambda a: a.size),)  # operand, result, flags
  kind = 'reduce-scatter' if scatters else kind
  group = _group(made.rest)
  size = sum(array.size for array in arrays)
  if made.opcode.startswith('reduce-scatter'):
    size *= group  # the operand is the larger one
  op_name = re.search(r'op_name="([^"]*)"', made.rest)
  return Collective(
      kind,
      arrays,
      group,
      _WIRE[kind](group) * size if group > 1 else 0.0,
      loops,
      op_name.group(1) if op_name else '',
      beside or made.opcode.endswith('-start'),
  )


def collectives(module: hlo.Module) -> list[Collective]:
  """Everything that a program sends.

  An asynchronous gather stands in the fusions that start it, go on with it and
  end it; those share a channel, which is counted once for each computation.
  """
  seen, found = set(), []
  for computation, made, loops in loops_lib.walk(module):
    inner = [made]
    if made.opcode in ('fusion', 'async-start') and 'calls' in made.called:
      inner = list(module.computations[made.called['calls']].values())
    # XLA fuses a reduce-scatter as an all-reduce of which a slice is kept.
    scatters = 'all-reduce-scatter' in made.called.get('calls', '')
    for op in inner:
      if _kind(op.opcode) is None:
        continue
      channel = re.search(r'channel_id=(\d+)', op.rest)
      key = (computation, channel.group(1) if channel else op.name)
      if key not in seen:
        seen.add(key)
        beside = op is not made and not scatters
        found.append(_collective(op, loops, scatters=scatters, beside=beside))
  return found


_FREE = frozenset(
    'parameter constant tuple get-tuple-element bitcast while call conditional'
    ' copy-done async-done async-update after-all partition-id replica-id'
    ' optimization-barrier iota broadcast add-dependency domain'.split()
)
_SLICES = ('dynamic-slice', 'slice', 'gather')
_MOVES = ('copy-start', 'async-start', 'slice-start')


def _hbm(arrays: tuple[hlo.Array, ...]) -> int:
  return sum(array.size for array in arrays if array.space == 0)


def _read_inside(
    module: hlo.Module, lines: hlo.Computation, name: str, whole: int
) -> int:
  """Bytes that a computation reads of one of its values, at most `whole`.

  Of what it only slices, or updates in place, the slices; also where those
  stand behind a bitcast or in a fusion inside of the fusion.
  """
  size = 0
  for user in (i for i in lines.values() if name in i.operands):
    is_first = user.operands[0] == name
    if user.opcode in _SLICES and is_first:
      size += sum(array.size for array in user.arrays)
    elif user.opcode in ('bitcast', 'reshape'):
      size += _read_inside(module, lines, user.name, whole)
    elif user.opcode == 'fusion':
      inner = module.computations[user.called['calls']]
      for i, operand in enumerate(user.operands):
        if operand == name:
          size += _read_inside(module, inner, _parameter(inner, i), whole)
    elif user.opcode != 'dynamic-update-slice' or not is_first:
      return whole
  return min(size, whole)


def _parameter(lines: hlo.Computation, index: int) -> str:
  """Name of a parameter; '' if there is no such."""
  for made in lines.values():
    if made.opcode == 'parameter' and made.rest.startswith(f'{index})'):
      return made.name
  return ''


def _update(
    module: hlo.Module, lines: hlo.Computation, made: hlo.Instruction
) -> int | None:
  """Bytes that a value writes into an array in place; None = all of it."""
  if made.opcode in ('bitcast', 'reshape') and made.operands[0] in lines:
    return _update(module, lines, lines[made.operands[0]])
  if made.opcode == 'fusion':
    inner = module.computations[made.called['calls']]
    root = next((i for i in inner.values() if i.is_root), None)
    return root and _update(module, inner, root)
  if made.opcode != 'dynamic-update-slice' or made.operands[1] not in lines:
    return None
  return sum(a.size for a in lines[made.operands[1]].arrays)


def _written(
    module: hlo.Module, made: hlo.Instruction, fused: hlo.Computation
) -> int:
  """Bytes that a fusion writes; in place where it updates a slice."""
  root = next((i for i in fused.values() if i.is_root), None)
  if root is None:
    return _hbm(made.arrays)
  parts = [root]
  if root.opcode == 'tuple':
    parts = [fused[name] for name in root.operands if name in fused]
  if len(parts) != len(made.arrays):
    return _hbm(made.arrays)
  total = 0
  for part, array in zip(parts, made.arrays, strict=True):
    if array.space == 0:
      update = _update(module, fused, part)
      total += array.size if update is None else update
  return total


def _touched(
    module: hlo.Module, lines: hlo.Computation, made: hlo.Instruction
) -> int:
  """Bytes of HBM that one instruction reads and writes."""
  if made.opcode in _FREE or made.opcode.endswith('-done'):
    return 0
  operands = [lines[name] for name in made.operands if name in lines]
  if made.opcode in _MOVES:  # (operand, result, flags)
    size = min((a.size for a in made.arrays[:2]), default=0)
    spaces = [a.space for a in made.arrays[:2]]
    return size * spaces.count(0)
  if made.opcode == 'dynamic-update-slice':
    return 2 * _hbm(lines[made.operands[1]].arrays)
  if made.opcode in _SLICES:
    return 2 * _hbm(made.arrays)
  if made.opcode != 'fusion':
    return _hbm(made.arrays) + sum(_hbm(o.arrays) for o in operands)
  fused = module.computations[made.called['calls']]
  if sent := [i for i in fused.values() if _kind(i.opcode)]:
    return _touched_beside(module, made, operands, fused, sent)
  read = sum(
      _read_inside(module, fused, name, _hbm(operand.arrays))
      for i, operand in enumerate(operands)
      if _hbm(operand.arrays) and (name := _parameter(fused, i))
  )
  return read + _written(module, made, fused)


def _touched_beside(
    module: hlo.Module,
    made: hlo.Instruction,
    operands: list[hlo.Instruction],
    fused: hlo.Computation,
    sent: list[hlo.Instruction],
) -> int:
  """Bytes of a fusion that works while a collective goes on.

  The collective's own arrays, and others that stand among operands and results
  alike, pass through all fusions that it spans; what was gathered is written
  once, by the one that starts it.
  """
  kept = lambda arrays: {(a.dtype, a.dims) for a in arrays}
  through = kept(a for op in sent for a in op.arrays)
  through |= kept(a for o in operands for a in o.arrays) & kept(made.arrays)
  beside = lambda arrays: _hbm(
      tuple(a for a in arrays if (a.dtype, a.dims) not in through)
  )
  total = beside(made.arrays)
  for i, operand in enumerate(operands):
    whole = beside(operand.arrays)
    if whole and (name := _parameter(fused, i)):
      total += _read_inside(module, fused, name, whole)
  return total + (
      sum(_hbm(op.arrays) for op in sent) if 'start' in made.name else 0
  )


def _each_touched(module: hlo.Module) -> Iterator[int]:
  for computation, made, loops in loops_lib.walk(module):
    lines = module.computations[computation]
    yield _touched(module, lines, made) * loops_lib.trips(loops)


def hbm_bytes(module: hlo.Module) -> int:
  """Bytes that one device reads from and writes to HBM, loops counted.

  What a fusion slices out of a stack of layers counts as the slice.
  """
  return sum(_each_touched(module))
