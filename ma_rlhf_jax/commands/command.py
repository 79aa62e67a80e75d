"""What a command is called with, and its help.

Help and version are answered from tables, before a command imports what takes
seconds. The same tables define the flags: see `absl_flags`.
"""

import ast
from collections.abc import Sequence
import dataclasses
import pathlib
import re
import sys
import textwrap
from typing import Any

from ma_rlhf_jax import __version__

PACKAGE = 'ma_rlhf_jax'
_ROOT = pathlib.Path(__file__).parents[1]
_WIDTH = 80
# absl takes -help and --helpshort as well.
HELP = ('--help', '-h', '-help', '--helpshort')


@dataclasses.dataclass(frozen=True)
class Flag:
  """One flag.

  Attributes:
    name: as it is typed, without dashes.
    value: what stands for its value in the help; '' = the flag is a switch.
    help: whole sentences, with the unit; the default is added to them.
    default: what it is where it is not given.
    shown: the default in words, where the value does not say it.
    kind: int, float, list (values with commas between them) or the values that
      it may have. None: the type of the default, or str; the flag may be
      repeated where that is a tuple.
    least: the smallest number; None = not bounded.
  """

  name: str
  value: str
  help: str
  default: Any = None
  shown: str = ''
  kind: type | Sequence[str] | None = None
  least: float | None = None

  def text(self) -> str:
    """The flag as it stands in a help."""
    head = f'--{self.name}={self.value}' if self.value else f'--{self.name}'
    default = self.shown or ('off' if self.default is False else '')
    if not default and self.value and self.default not in (None, '', ()):
      default = str(self.default)
    said = self.help + (f' Default: {default}.' if default else '')
    return f'  {head}\n{_filled(said, "      ")}'


@dataclasses.dataclass(frozen=True)
class Command:
  """One command of the package.

  Attributes:
    name: as in `python -m ma_rlhf_jax.NAME`.
    flags: those that are its own.
    examples: command lines, without `python -m ma_rlhf_jax.NAME`.
    recipe: flags of recipes, which `recipe_flag` defines.
    processes: flags that name several processes; `cluster_flags` defines them.
  """

  name: str
  flags: tuple[Flag, ...]
  examples: tuple[str, ...]
  recipe: tuple[Flag, ...] = ()
  processes: tuple[Flag, ...] = ()

  @property
  def call(self) -> str:
    """How the command is called."""
    return f'python -m {PACKAGE}.{self.name}'

  @property
  def all_flags(self) -> tuple[Flag, ...]:
    """Every flag of the command, in the order of its help."""
    return (*self.recipe, *self.flags, *self.processes, *_ANY)

  def doc(self) -> str:
    """The docstring of its module, which is not imported."""
    path = _ROOT / f'{self.name.replace(".", "/")}.py'
    return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))

  def text(self) -> str:
    """The help, in lines of at most 80 characters."""
    return '\n'.join(
        [
            f'usage: {self.call} [flags]\n',
            f'{self.doc()}\n\nflags:',
            *(flag.text() for flag in self.all_flags),
            '\nexamples:',
            *(_example(f'{self.call} {line}') for line in self.examples),
        ]
    )


_ANY = (
    Flag('help', '', 'Prints this text; -h does so too.'),
    Flag('version', '', f'Prints the version of {PACKAGE}.'),
)


def _filled(text: str, indent: str) -> str:
  """`text` in lines, broken at blanks alone."""
  return textwrap.fill(
      text,
      _WIDTH,
      initial_indent=indent,
      subsequent_indent=indent,
      break_long_words=False,
      break_on_hyphens=False,
  )


def _example(line: str) -> str:
  r"""A command line as a shell reads it, broken by `\` where it is long."""
  # Blanks between quotes are no places to break.
  whole = re.sub("'[^']*'", lambda m: m[0].replace(' ', '\0'), line)
  lines = _filled(whole, ' ' * 6).splitlines()  # room for `  ` and ` \`
  broken = ' \\\n    '.join(line.strip() for line in lines)
  return '  ' + broken.replace('\0', ' ')


def _asked(command: Command, words: Sequence[str]) -> str:
  """Whether a command line asks for 'help' or 'version'; '' if it does not."""
  with_value = {
      f'{dashes}{flag.name}'
      for flag in command.all_flags
      for dashes in ('-', '--')
      if flag.value
  }
  is_value = False
  for word in words:
    if word == '--':
      break
    if is_value:
      is_value = False
    elif word in HELP:
      return 'help'
    elif word == '--version':
      return 'version'
    else:
      is_value = word in with_value
  return ''


def answer(command: Command) -> None:
  """Prints help or version, and ends, where the command line asks for it."""
  asked = _asked(command, sys.argv[1:])
  if asked:
    print(command.text() if asked == 'help' else version())
    sys.exit(0)


def version() -> str:
  """`ma_rlhf_jax 0.1.0`."""
  return f'{PACKAGE} {__version__}'
