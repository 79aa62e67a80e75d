"""How often the loops of a compiled program run, and what runs in them.

XLA writes a loop as its start values, a body and a condition. Which counter the
condition looks at, where it starts, by how much the body moves it and where it
ends are followed through tuples, copies, fusions and the loops around, since
every release of XLA fuses and hoists them differently. What cannot be followed
makes a loop that is not `counted`, never a guess.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import re

from ma_rlhf_jax.planning.hlo import Computation, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Loop:
  """One while loop.

  Attributes:
    name: of the instruction.
    trips: how often its body runs, at most; 1 where that cannot be told.
    may_end_early: whether its condition asks for more than a count.
    counted: whether `trips` follows from the text.
  """

  name: str
  trips: int
  may_end_early: bool
  counted: bool = True


@dataclasses.dataclass(frozen=True)
class _Element:
  """Element `index` of a loop's state as a trip begins, plus a number."""

  index: int
  plus: int = 0


_Value = int | _Element | None

# Give their operand, or its scalar in another form.
_SAME = frozenset(
    'copy copy-start copy-done bitcast convert reshape broadcast slice'
    ' optimization-barrier'.split()
)
_FOLDED: dict[str, Callable[[int, int], int]] = {
    'add': lambda a, b: a + b,
    'subtract': lambda a, b: a - b,
    'multiply': lambda a, b: a * b,
    'maximum': max,
    'minimum': min,
}
_MIRRORED = {'LT': 'GT', 'LE': 'GE', 'GT': 'LT', 'GE': 'LE', 'NE': 'NE'}


def _root(lines: Computation) -> Instruction:
  return next(made for made in lines.values() if made.is_root)


def _number(pattern: str, made: Instruction) -> int | None:
  found = re.search(pattern, made.rest)
  return int(found.group(1)) if found else None


class _Scope:
  """A computation, and what is known of the whole numbers that it is given."""

  def __init__(
      self,
      module: Module,
      lines: Computation,
      given: Callable[[int, int | None], _Value],
      caller: tuple['_Scope', Instruction] | None = None,
  ):
    """Of the values nothing is worked out yet.

    Args:
      module: the whole program.
      lines: of the computation.
      given: value of a parameter by its number, or of one element of it.
      caller: of a fusion or call: where it stands, and its line.
    """
    self.module, self.lines, self.given = module, lines, given
    self.caller = caller

  def inside(self, made: Instruction) -> '_Scope':
    """The computation of a fusion or call of this one."""
    name = made.called.get('calls') or made.called['to_apply']
    given = lambda i, at: self.value(made.operands[i], at)
    lines = self.module.computations[name]
    return _Scope(self.module, lines, given, (self, made))

  def branch(self, made: Instruction, index: int) -> '_Scope':
    """One computation of a conditional of this one."""
    # The first operand chooses; each branch has one of the others.
    given = lambda i, at: self.value(made.operands[1 + index], at)
    lines = self.module.computations[made.branches[index]]
    return _Scope(self.module, lines, given)

  def value(self, name: str, at: int | None = None) -> _Value:
    """A scalar, or one of a tuple's; None where it does not follow."""
    made = self.lines.get(name)
    if made is None:
      return None
    if made.opcode == 'constant':
      return _number(r'^\{?\s*(-?\d+)\s*\}?\)', made)
    if made.opcode == 'parameter':
      return self.given(_number(r'^(\d+)\)', made), at)
    if made.opcode == 'get-tuple-element' and at is None:
      return self.value(made.operands[0], _number(r'index=(\d+)', made))
    if made.opcode == 'tuple' and at is not None:
      return self.value(made.operands[at])
    if made.opcode in _SAME:
      return self.value(made.operands[0], at)
    if made.opcode in ('fusion', 'call'):
      inner = self.inside(made)
      return inner.value(_root(inner.lines).name, at)
    if made.opcode == 'while' and at is not None:
      return _While(self, made).after(at)
    if made.opcode in _FOLDED and len(made.operands) == 2:
      return _folded(made.opcode, *map(self.value, made.operands))
    return None


def _folded(opcode: str, a: _Value, b: _Value) -> _Value:
  if isinstance(a, int) and isinstance(b, int):
    return _FOLDED[opcode](a, b)
  if opcode == 'add' and isinstance(b, _Element):
    a, b = b, a
  if opcode in ('add', 'subtract') and isinstance(a, _Element):
    if isinstance(b, int):
      return dataclasses.replace(a, plus=_FOLDED[opcode](a.plus, b))
  return None


@dataclasses.dataclass(frozen=True)
class _Compare:
  """`left direction right` of a condition."""

  left: _Value
  right: _Value
  direction: str


def _compares(scope: _Scope, name: str) -> tuple[list[_Compare], bool]:
  """What must all hold for a predicate to hold, and whether that is enough."""
  made = scope.lines.get(name)
  if made is None:
    return [], False
  if made.opcode == 'compare':
    sides = map(scope.value, made.operands[:2])
    direction = re.search(r'direction=(\w+)', made.rest)
    return [_Compare(*sides, direction.group(1) if direction else '')], True
  if made.opcode == 'and':
    parts = [_compares(scope, operand) for operand in made.operands]
    return sum((found for found, _ in parts), []), False
  if made.opcode == 'parameter' and scope.caller:
    outer, call = scope.caller
    return _compares(outer, call.operands[_number(r'^(\d+)\)', made)])
  if made.opcode == 'fusion':
    inner = scope.inside(made)
    return _compares(inner, _root(inner.lines).name)
  if made.opcode in _SAME:
    return _compares(scope, made.operands[0])
  return [], False


class _While:
  """A while loop where it stands."""

  def __init__(self, caller: _Scope, made: Instruction):
    """Nothing is worked out yet.

    Args:
      caller: the computation that it stands in.
      made: its line.
    """
    self.caller, self.made = caller, made
    computations = caller.module.computations
    self.state = lambda i, at: None if at is None else _Element(at)
    self.body = computations[made.called['body']]
    self.condition = computations[made.called['condition']]

  def start(self, index: int) -> _Value:
    """Of one element of the state."""
    return self.caller.value(self.made.operands[0], index)

  def step(self, index: int) -> int | None:
    """By how much a trip moves an element; 0 = it stays; None = unknown."""
    scope = _Scope(self.caller.module, self.body, self.state)
    value = scope.value(_root(self.body).name, index)
    same = isinstance(value, _Element) and value.index == index
    return value.plus if same else None

  def fixed(self, value: _Value) -> _Value:
    """A value that is the same in all trips."""
    if isinstance(value, _Element) and self.step(value.index) == 0:
      return _folded('add', self.start(value.index), value.plus)
    return value if isinstance(value, int) else None

  def _trips(self, compare: _Compare) -> int | None:
    """For how many trips one comparison holds; None where it is unknown."""
    counter, bound, direction = compare.left, compare.right, compare.direction
    if not self._moves(counter):
      counter, bound = bound, counter
      direction = _MIRRORED.get(direction, '')
    if not self._moves(counter):
      return None
    step, bound = self.step(counter.index), self.fixed(bound)
    start = _folded('add', self.start(counter.index), counter.plus)
    if not isinstance(start, int) or bound is None:
      return None
    gap = bound - start
    if step < 0:
      gap, step, direction = -gap, -step, _MIRRORED.get(direction, '')
    if direction == 'NE':
      return gap // step if gap >= 0 and gap % step == 0 else None
    if direction not in ('LT', 'LE'):
      return None
    return max(0, -(-(gap + (direction == 'LE')) // step))

  def _moves(self, value: _Value) -> bool:
    return isinstance(value, _Element) and bool(self.step(value.index))

  def loop(self) -> Loop:
    """Its trips, those that XLA tells before those that are worked out."""
    scope = _Scope(self.caller.module, self.condition, self.state)
    compares, enough = _compares(scope, _root(self.condition).name)
    told = _number(r'"known_trip_count":\{"n":"(\d+)"', self.made)
    found = [self._trips(compare) for compare in compares]
    found = [trips for trips in found if trips is not None]
    if told is not None:
      found, enough = [told], True
    early = not (enough and found)
    return Loop(self.made.name, min(found, default=1), early, bool(found))

  def after(self, index: int) -> _Value:
    """One element of the state when all trips are made."""
    step = self.step(index)
    if step:
      loop = self.loop()
      step = step * loop.trips if loop.counted else None
    return None if step is None else _folded('add', self.start(index), step)

  def inside(self) -> _Scope:
    """Its body, given what is the same in all trips."""
    given = lambda i, at: None if at is None else self.fixed(_Element(at))
    return _Scope(self.caller.module, self.body, given)


def walk(
    module: Module,
) -> Iterator[tuple[str, Instruction, tuple[Loop, ...]]]:
  """(computation, instruction, loops around it) of all that runs.

  Fusions are one instruction each; bodies of loops and calls are entered, and
  of the branches of a conditional the one that makes the most.
  """
  unknown = lambda i, at: None
  entry = _Scope(module, module.computations[module.entry], unknown)
  yield from _walk(entry, module.entry, ())


def _walk(
    scope: _Scope, computation: str, loops: tuple[Loop, ...]
) -> Iterator[tuple[str, Instruction, tuple[Loop, ...]]]:
  module = scope.module
  for made in scope.lines.values():
    yield computation, made, loops
    if made.opcode == 'while':
      found = _While(scope, made)
      inner = (*loops, found.loop())
      yield from _walk(found.inside(), made.called['body'], inner)
      lines = found.condition
      unknown = lambda i, at: None
      condition = _Scope(module, lines, unknown)
      yield from _walk(condition, made.called['condition'], inner)
    elif made.opcode == 'call':
      yield from _walk(scope.inside(made), made.called['to_apply'], loops)
    elif made.opcode == 'conditional':
      branches = [
          (scope.branch(made, i), name, loops)
          for i, name in enumerate(made.branches)
      ]
      yield from _walk(*max(branches, key=lambda b: _made_in(*b)))


def _made_in(scope: _Scope, computation: str, loops: tuple[Loop, ...]) -> int:
  """Bytes of all values that a computation makes, loops counted."""
  return sum(
      array.size * trips(inner)
      for _, made, inner in _walk(scope, computation, loops)
      for array in made.arrays
  )


def trips(loops: tuple[Loop, ...]) -> int:
  """How often what is inside these loops runs."""
  return math.prod(loop.trips for loop in loops)


def uncounted(module: Module) -> tuple[str, ...]:
  """Names of the loops whose trips cannot be told, each once."""
  found = {
      loop.name: None
      for _, _, loops in walk(module)
      for loop in loops
      if not loop.counted
  }
  return tuple(found)
