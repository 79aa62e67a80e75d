"""Reads the HLO text that XLA dumps: computations, loops and their trips.

The format is no contract, so `plan` pins libtpu. Lines that are no instructions
(the newlines inside of Pallas calls) are passed over.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

_ITEMSIZE = {
    'pred': 1,
    's4': 0.5,
    'u4': 0.5,
    's8': 1,
    'u8': 1,
    's16': 2,
    'u16': 2,
    'bf16': 2,
    'f16': 2,
    's32': 4,
    'u32': 4,
    'f32': 4,
    's64': 8,
    'u64': 8,
    'f64': 8,
    'c64': 8,
}
# f32[28,3072]{1,0:T(8,128)S(1)}: type, sizes, memory space (absent: HBM).
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_NAME = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(r'(condition|body|calls|to_apply)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape, on one device.

  Attributes:
    dtype: XLA's name.
    dims: sizes.
    space: 0 = HBM.
  """

  dtype: str
  dims: tuple[int, ...]
  space: int

  @property
  def size(self) -> int:
    """Bytes, without the padding of tiles."""
    itemsize = _ITEMSIZE.get(self.dtype, 1)  # float8 types have one byte
    return int(math.prod(self.dims) * itemsize)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in its module.
    shape: text, of an array or a tuple.
    opcode: fusion, while, all-gather, ...
    operands: names, in order.
    rest: text inside and after the parentheses.
    is_root: whether its value is that of the computation.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """Of its shape, in order."""
    return tuple(
        Array(
            dtype, tuple(map(int, filter(None, dims.split(',')))), int(s or 0)
        )
        for dtype, dims, s in _ARRAY.findall(self.shape)
    )

  @functools.cached_property
  def called(self) -> dict[str, str]:
    """Computations by role: condition, body, calls, to_apply."""
    return dict(_CALLED.findall(self.rest))

  @property
  def branches(self) -> list[str]:
    """Computations of a conditional."""
    found = _BRANCHES.search(self.rest)
    return _NAME.findall(found.group(1)) if found else []


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    computations: by name; each maps names to instructions in order.
    entry: name of the computation that runs first.
  """

  computations: dict[str, Computation]
  entry: str


@dataclasses.dataclass(frozen=True)
class Loop:
  """One while loop.

  Attributes:
    name: of the instruction.
    trips: how often its body runs, at most.
    may_end_early: whether its condition asks for more than a count.
  """

  name: str
  trips: int
  may_end_early: bool


def _closing(text: str) -> int:
  """Index of the parenthesis that closes the first character."""
  depth = 0
  for i, c in enumerate(text):
    depth += (c == '(') - (c == ')')
    if not depth:
      return i
  return len(text) - 1


def _instruction(line: str) -> Instruction | None:
  found = _LINE.match(line)
  if not found:
    return None
  root, name, rest = found.groups()
  end = _closing(rest) + 1 if rest.startswith('(') else rest.find(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, paren, inside = rest.partition('(')
  if not paren:
    return None
  end = _closing('(' + inside)
  operands = tuple(_NAME.findall(inside[: max(end - 1, 0)]))
  return Instruction(name, shape, opcode, operands, inside, bool(root))


def parse(text: str) -> Module:
  """The module of a dumped `*after_optimizations*.txt`."""
  computations: dict[str, Computation] = {}
  entry, current = '', None
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = computations.setdefault(head.group(2), {})
      entry = head.group(2) if head.group(1) else entry
    elif current is not None and (made := _instruction(line)):
      current[made.name] = made
  if not entry:
    raise ValueError('the dumped HLO has no ENTRY computation')
  return Module(computations, entry)


def _integer(computation: Computation, name: str) -> int | None:
  """The value of a constant, also through copies; None if it is none."""
  made = computation.get(name)
  while made is not None and made.opcode in ('copy', 'bitcast', 'convert'):
    made = computation.get(made.operands[0]) if made.operands else None
  if made is None or made.opcode != 'constant':
    return None
  found = re.match(r'(-?\d+)\)', made.rest)
  return int(found.group(1)) if found else None


def _start(caller: Computation, loop: Instruction, index: int) -> int:
  """What a loop counter starts from; 0 where it cannot be told."""
  state = caller.get(loop.operands[0]) if loop.operands else None
  if state is None or state.opcode != 'tuple' or index >= len(state.operands):
    return 0
  return _integer(caller, state.operands[index]) or 0


def loop_of(
    module: Module, caller: Computation, instruction: Instruction
) -> Loop:
  """How often a while loop runs: its bound less what its counter starts from.

  Counters step by one, as `scan` and `while_loop` leave them. A loop whose
  bound is no constant counts as one trip. Where XLA itself tells the trips (it
  does for CPUs), that is taken.
  """
  told = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
  if told:
    return Loop(instruction.name, int(told.group(1)), False)
  condition = module.computations[instruction.called['condition']]
  root = next(i for i in condition.values() if i.is_root)
  trips = 1
  for made in condition.values():
    direction = re.search(r'direction=(\w+)', made.rest)
    if made.opcode != 'compare' or not direction:
      continue
    counter, bound = made.operands[:2]
    limit = _integer(condition, bound)
    if limit is None or direction.group(1) not in ('LT', 'LE', 'NE'):
      continue
    index = re.search(r'index=(\d+)', condition[counter].rest)
    start = _start(caller, instruction, int(index.group(1))) if index else 0
    limit += direction.group(1) == 'LE'
    trips = max(trips, limit - start)
  return Loop(instruction.name, trips, root.opcode != 'compare')


def walk(
    module: Module, computation: str = '', loops: tuple[Loop, ...] = ()
) -> Iterator[tuple[str, Instruction, tuple[Loop, ...]]]:
  """(computation, instruction, loops around it) of all that runs.

  Fusions are one instruction each; bodies of loops and calls are entered, and
  of the branches of a conditional the one that makes the most.
  """
  computation = computation or module.entry
  lines = module.computations[computation]
  for made in lines.values():
    yield computation, made, loops
    if made.opcode == 'while':
      inner = (*loops, loop_of(module, lines, made))
      yield from walk(module, made.called['body'], inner)
      yield from walk(module, made.called['condition'], inner)
    elif made.opcode == 'call':
      yield from walk(module, made.called['to_apply'], loops)
    elif made.opcode == 'conditional':
      most = max(made.branches, key=lambda branch: _made_in(module, branch))
      yield from walk(module, most, loops)


def _made_in(module: Module, computation: str) -> int:
  """Bytes of all values that a computation makes, loops counted."""
  return sum(
      array.size * trips(loops)
      for _, made, loops in walk(module, computation)
      for array in made.arrays
  )


def trips(loops: tuple[Loop, ...]) -> int:
  """How often what is inside these loops runs."""
  return math.prod(loop.trips for loop in loops)
