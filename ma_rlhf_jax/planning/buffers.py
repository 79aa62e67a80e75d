"""Memory of a compiled program, from the buffer assignment that XLA dumps.

XLA writes it before it generates machine code, which takes 90 % of the time.
Thread-local allocations are left out: those are intermediates of fusions, not
memory ("Total bytes" of XLA's own report counts them).
"""

from collections.abc import Iterator
import dataclasses
import re

# allocation 241: size 7456358912, page 0, preallocated-temp:
_ALLOCATION = re.compile(r'^allocation \d+: size (\d+)(.*)$')
#  value: <49 fusion.3{0} @1> (size=393216,offset=0): f32[28,3072]{1,0:T(8,128)}
_VALUE = re.compile(
    r'^ value: <\d+ (\S+).*> \(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])'
)


@dataclasses.dataclass(frozen=True)
class Buffer:
  """One piece of temporary memory.

  Attributes:
    size: bytes.
    shape: as in bf16[28,4,1024,3072], of one of the values that it holds.
    value: the instruction that makes it.
  """

  size: int
  shape: str
  value: str


@dataclasses.dataclass(frozen=True)
class Memory:
  """What one device holds while a program runs, bytes of HBM.

  Attributes:
    args: of the arguments; outputs that reuse them are in here.
    temp: of temporaries.
    out: of outputs that have memory of their own.
    largest: the largest temporaries, largest first, one for each place.
  """

  args: int
  temp: int
  out: int
  largest: tuple[Buffer, ...] = ()

  @property
  def need(self) -> int:
    """All of it."""
    return self.args + self.temp + self.out


def _sections(text: str) -> Iterator[tuple[int, str, list[str]]]:
  """(bytes, what is said of it, its lines) of every allocation."""
  size, told, lines = 0, '', []
  for line in text.splitlines():
    if found := _ALLOCATION.match(line):
      if told:
        yield size, told, lines
      size, told, lines = int(found.group(1)), found.group(2), []
    else:
      lines.append(line)
  if told:
    yield size, told, lines


def _largest(lines: list[str], count: int) -> tuple[Buffer, ...]:
  """The largest values; of those that share a place only the first."""
  values = [m.groups() for m in map(_VALUE.match, lines) if m]
  values.sort(key=lambda v: -int(v[1]))
  taken, kept = [], []
  for name, size, offset, shape in values:
    start, end = int(offset), int(offset) + int(size)
    if all(end <= s or start >= e for s, e in taken):
      taken.append((start, end))
      kept.append(Buffer(int(size), shape, name.partition('{')[0]))
    if len(kept) == count:
      break
  return tuple(kept)


def parse(text: str, count: int = 5) -> Memory:
  """The memory that `*-buffer-assignment.txt` tells of.

  Args:
    text: of the file.
    count: how many of the largest temporaries are named.
  """
  sums = {'args': 0, 'temp': 0, 'out': 0}
  largest: tuple[Buffer, ...] = ()
  for size, told, lines in _sections(text):
    if 'thread-local' in told or 'color' in told:
      continue  # not memory, or another memory than HBM
    if 'preallocated-temp' in told:
      sums['temp'] += size
      largest = max(largest, _largest(lines, count), key=len)
    elif 'parameter' in told:
      sums['args'] += size
    elif 'live-out' in told:
      sums['out'] += size
    else:
      sums['temp'] += size  # constants
  return Memory(**sums, largest=largest)
