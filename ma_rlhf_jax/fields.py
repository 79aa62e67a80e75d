"""What a config field is: default, check, meaning, source.

The fields themselves stand in `config_fields`. Nothing here imports what takes
time, so that help is answered at once.
"""

import ast
from collections.abc import Callable
import dataclasses
import functools
import math
import pathlib
import re
from typing import Any, NamedTuple

from ma_rlhf_jax import registry

# The largest numbers of a field that has no bound of its own.
_LARGEST = {int: 2**31 - 1, float: 1e30}


@functools.cache
def _listed(table: str) -> tuple[str, ...]:
  """The keys of a dict, or the entries of a tuple, read from its source.

  Its module, which the house has below this one, may take seconds to import.
  """
  module, _, name = table.partition(':')
  path = pathlib.Path(__file__).parent / f'{module.replace(".", "/")}.py'
  for node in ast.parse(path.read_text(encoding='utf-8')).body:
    target = node.targets[0] if isinstance(node, ast.Assign) else node
    target = getattr(target, 'target', target)
    if getattr(target, 'id', '') == name:
      value = node.value
      found = value.keys if isinstance(value, ast.Dict) else value.elts
      return tuple(ast.literal_eval(entry) for entry in found)
  raise LookupError(f'{path} has no table {name}')


@dataclasses.dataclass(frozen=True)
class Check:
  """What the value of a field must be.

  Attributes:
    words: that follow "must be"; '' = one of the names, or anything.
    holds: whether a value is so.
    entries: names, and tables of names as `room.module:TABLE`.
    takes_own: what a function of the user's own, `module:function`, is called
      with; () = no such name is allowed.
    most: the largest number; inf = as large as any number may be.
  """

  words: str = ''
  holds: Callable[[Any], bool] = lambda value: True
  entries: tuple[str, ...] = ()
  takes_own: tuple[str, ...] = ()
  most: float = math.inf

  @property
  def names(self) -> tuple[str, ...]:
    """The names of which the value must be one; () = there are none."""
    found = [_listed(e) if ':' in e else (e,) for e in self.entries]
    return tuple(name for names in found for name in names)

  @property
  def need(self) -> str:
    """What follows "must be"; '' = nothing is needed."""
    if not self.entries:
      return self.words
    own = ', or module:function' if self.takes_own else ''
    return f'one of {", ".join(filter(None, self.names))}{own}'


def _spelt(number: float) -> str:
  """A bound as one types it: 1e6, 1048576, 0.0001."""
  if isinstance(number, int):
    return str(number)
  return re.sub(r'e([+-])0*', r'e\1', f'{number:g}').replace('e+', 'e')


def within(
    least: float,
    most: float = math.inf,
    *also: float,
    above: bool = False,
    below: bool = False,
) -> Check:
  """A check for a number from `least` to `most`, or one of `also`.

  With `above`, `least` itself is not allowed; with `below`, `most` is not.
  """
  words = f'{"above" if above else "at least"} {_spelt(least)}'
  if most < math.inf:
    words += f' and {"below" if below else "at most"} {_spelt(most)}'
    if not above and not below:
      words = f'between {_spelt(least)} and {_spelt(most)}'

  def holds(value: float) -> bool:
    inside = least < value if above else least <= value
    inside &= value < most if below else value <= most
    return inside or value in also

  return Check(', or '.join([words, *map(_spelt, also)]), holds, most=most)


def at_least(least: float, *also: float) -> Check:
  """A check for a number from `least` on, or one of `also`."""
  return within(least, math.inf, *also)


def above(least: float, most: float = math.inf) -> Check:
  """A check for a number above `least`, up to `most`."""
  return within(least, most, above=True)


def one_of(*entries: str, or_own: tuple[str, ...] = ()) -> Check:
  """A check for one of the names, see `Check.entries` and `Check.takes_own`."""
  return Check(entries=entries, takes_own=or_own)


def some_of(*entries: str, least: int = 0, in_order: bool = False) -> Check:
  """A check for a tuple of at least `least` of the names.

  With `in_order` they must stand in the order of `entries`, each once.
  """
  names = one_of(*entries).names
  order = ', in this order' if in_order else ''

  def holds(value: tuple[Any, ...]) -> bool:
    known = [name for name in value if name in names]
    is_sorted = known == [name for name in names if name in known]
    return len(value) == len(known) >= least and (is_sorted or not in_order)

  return Check(f'a tuple of some of {", ".join(names)}{order}', holds)


def many(
    words: str, least: int, holds: Callable[[Any], bool], whole: bool = True
) -> Check:
  """A check for a tuple of numbers from `least` on, whole ones or any.

  `words` say so, and what else `holds` asks of them.
  """
  types = (int,) if whole else (int, float)
  is_number = lambda x: type(x) in types and least <= x < 2**31
  return Check(words, lambda value: all(map(is_number, value)) and holds(value))


# Any text, and True or False.
TEXT, SWITCH = Check(), Check()
# Below 1e-4 float32 divides log-probs to infinity.
TEMPERATURE = within(1e-4, 1e6, 0)


@dataclasses.dataclass(frozen=True)
class Field:
  """One field.

  Attributes:
    default: of `config.base`.
    check: what its value must be.
    meaning: sentences, with the unit.
    source: of the default; '' = chosen here.
    resumable: whether it may change when a run is started again in its workdir.
  """

  default: Any
  check: Check
  meaning: str
  source: str = ''
  resumable: bool = False

  @property
  def choices(self) -> tuple[Any, ...]:
    """The values that it may have, where they are few; else ()."""
    is_switch = isinstance(self.default, bool)
    return (False, True) if is_switch else self.check.names

  def problem(self, name: str, value: Any) -> str:
    """What is wrong with a value, in one line; '' if nothing is.

    Args:
      name: of the field, with its blocks.
      value: of the type of the default.
    """
    value = tuple(value) if isinstance(value, list) else value
    check, kind = self.check, type(value)
    if check.takes_own:
      return registry.problem(check.names, value, name, check.takes_own)
    if kind is float and not math.isfinite(value):
      return f'{name}={value!r} must be a finite number'
    if not check.holds(value) or (check.entries and value not in check.names):
      return f'{name}={value!r} must be {check.need}'
    largest = _LARGEST.get(kind) if check.most == math.inf else None
    if largest and abs(value) > largest:
      return f'{name}={value!r} must be at most {_spelt(largest)} in size'
    return ''


class Block(NamedTuple):
  """Fields by name; that of an inner block stands before a dot."""

  title: str
  fields: dict[str, Field]


def block(title: str, resumable: bool = False, **entries: Any) -> Block:
  """A block of fields and of dicts of fields, all of them resumable or not."""
  fields = {}
  for name, entry in entries.items():
    inner = entry.items() if isinstance(entry, dict) else [('', entry)]
    for own, field in inner:
      marked = dataclasses.replace(field, resumable=True)
      whole = f'{name}.{own}' if own else name
      fields[whole] = marked if resumable else field
  return Block(title, fields)
