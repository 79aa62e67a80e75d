"""Reads the HLO text that XLA dumps: computations and their instructions.

The format is no contract, so `plan` pins libtpu. Lines that are no instructions
(the newlines inside of Pallas calls) are passed over.
"""

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
# %state#3 is element 3 of a tuple, which other releases read on a line of its
# own.
_OPERAND = re.compile(r'%([\w.\-]+(?:#\d+)*)')
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
    unread: operands that no line of their computation makes. Where there are
      any, the text is of a form that is not known here.
  """

  computations: dict[str, Computation]
  entry: str
  unread: tuple[str, ...] = ()


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
  operands = tuple(_OPERAND.findall(inside[: max(end - 1, 0)]))
  return Instruction(name, shape, opcode, operands, inside, bool(root))


def _elements(shape: str) -> list[str]:
  """The shapes inside of that of a tuple."""
  found, depth, start = [], 0, 1
  for i, c in enumerate(shape):
    depth += (c in '([{') - (c in ')]}')
    if (c == ',' and depth == 1) or (c == ')' and depth == 0):
      found.append(re.sub(r'/\*.*?\*/', '', shape[start:i]).strip())
      start = i + 1
  return found


def _add_element(lines: Computation, name: str) -> None:
  """The line that `tuple#3` stands for, unless there is one already."""
  of, _, index = name.rpartition('#')
  if not of or name in lines:
    return
  _add_element(lines, of)
  shapes = _elements(lines[of].shape) if of in lines else []
  if int(index) < len(shapes):
    lines[name] = Instruction(
        name,
        shapes[int(index)],
        'get-tuple-element',
        (of,),
        f'%{of}), index={index}',
        False,
    )


def _unread(lines: Computation) -> set[str]:
  return {
      name
      for made in lines.values()
      for name in made.operands
      if name not in lines
  }


def parse(text: str) -> Module:
  """The module of a dumped `*after_optimizations*.txt`."""
  computations: dict[str, Computation] = {}
  entry, current = '', None
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = computations.setdefault(head.group(2), {})
      entry = head.group(2) if head.group(1) else entry
    elif current is not None and (made := _instruction(line)):
      for name in made.operands:
        _add_element(current, name)
      current[made.name] = made
  if not entry:
    raise ValueError('the dumped HLO has no ENTRY computation')
  unread = sorted(set().union(*map(_unread, computations.values())))
  return Module(computations, entry, tuple(unread))
