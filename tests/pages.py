"""Reads the Markdown pages: blocks of code, commands, flags, names, links.

The flags of commands are those of the tables that define them.
"""

import ast
from collections.abc import Iterator
import functools
import pathlib
import re
import shlex
from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

from ma_rlhf_jax import __main__ as listed
from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import recipe
from ma_rlhf_jax.commands import absl_flags
from ma_rlhf_jax.commands.command import HELP, Command

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'ma_rlhf_jax'
PAGES = sorted(
    path
    for folder in ('.', 'configs', 'launch', 'tests', 'ma_rlhf_jax')
    for path in (ROOT / folder).glob('*.md' if folder == '.' else '**/*.md')
)
# Words that are answered before anything else is read.
_ANSWERED = (*HELP, '--version')


class Block(NamedTuple):
  """A fenced block of code; `language` is '' where none is named."""

  language: str
  text: str


def name_of(page: pathlib.Path) -> str:
  """The path of a page in the repository."""
  return str(page.relative_to(ROOT))


def blocks(text: str) -> list[Block]:
  """The fenced blocks of a page, in order."""
  return [
      Block(*b) for b in re.findall(r'^```(\w*)\n(.*?)^```$', text, re.M | re.S)
  ]


def prose(text: str) -> str:
  """A page without its fenced blocks; their lines are left empty."""
  empty = lambda match: '\n' * match[0].count('\n')
  return re.sub(r'^```.*?^```$', empty, text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
  """What stands in backticks in the prose of a page."""
  return re.findall(r'`([^`\n]+)`', prose(text))


def command_lines(text: str) -> list[str]:
  """The lines of the blocks that name no language, continued ones joined."""
  lines = []
  for language, body in blocks(text):
    if not language:
      lines += re.sub(r'\\\n\s*', '', body).splitlines()
  return [line for line in lines if line.strip()]


def links(text: str) -> list[str]:
  """Targets of the links and pictures of a page."""
  text = prose(text)
  return re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(
      r'^\[[^\]]+\]: (\S+)$', text, re.M
  )


def anchors(text: str) -> set[str]:
  """The anchors that GitHub gives the headings of a page."""
  headings = re.findall(r'^#+ (.+)$', prose(text), re.M)
  return {
      re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings
  }


def files(text: str) -> dict[str, str]:
  """Name -> code of the files that a page shows, by their first comment."""
  named = {b.text: re.match(r'# (\w+\.py)\n', b.text) for b in blocks(text)}
  return {match[1]: code for code, match in named.items() if match}


def is_recipe(code: str) -> bool:
  """Whether a file is a recipe; else it holds functions for one."""
  return '\ndef get_config(' in code


def command_of(module: str) -> Command:
  """The command that `python -m ma_rlhf_jax.train` runs.

  Raises:
    LookupError: if there is no such command.
  """
  known = {f'ma_rlhf_jax.{c.name}': c for c in listed.COMMANDS}
  if module not in known:
    raise LookupError(f'no command {module}')
  return known[module]


def lists_commands(arguments: list[str]) -> bool:
  """Whether `python -m ma_rlhf_jax` takes these arguments."""
  return arguments in ([], *([word] for word in _ANSWERED))


@functools.cache
def script_flags(script: str) -> frozenset[str]:
  """The flags of a script of `launch/`, without their dashes."""
  text = (ROOT / 'launch' / script).read_text()
  if '/common.sh"' in text:
    text += (ROOT / 'launch' / 'common.sh').read_text()
  found = re.findall(r'^\s*--(\w+)(?:=\*)?\)', text, re.M)
  if 'answer_help "' in text:
    found.append('help')
  return frozenset(found)


@functools.cache
def argparse_flags(path: pathlib.Path) -> frozenset[str]:
  """The flags that a script defines by argparse, pytest's options included."""
  found = re.findall(r"(?:argument|option)\(\s*'--(\w+)'", path.read_text())
  return frozenset(found)


@functools.cache
def all_flags() -> set[str]:
  """Every flag of every command, script and benchmark."""
  known = {flag.name for c in listed.COMMANDS for flag in c.all_flags}
  for path in (ROOT / 'launch').glob('*.sh'):
    known |= script_flags(path.name)
  others = [*(ROOT / 'tests' / 'benchmarks').glob('*.py')]
  others += [ROOT / 'tests' / 'conftest.py', PACKAGE / 'tools' / 'parse.py']
  return known.union(*map(argparse_flags, others))


class _Recipe(flags.ArgumentParser):
  """A recipe of the repository, or of a folder with those that pages show."""

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder = folder

  def parse(self, argument: str) -> object:
    path = argument.partition(':')[0]
    here = ROOT if (ROOT / path).is_file() else self._folder
    return recipe.load(f'{here}/{argument}')

  def flag_type(self) -> str:
    return 'recipe'


def parse(
    module: str, arguments: list[str], folder: pathlib.Path
) -> flags.FlagValues:
  """Parses the arguments of a command as the command does.

  Args:
    module: `ma_rlhf_jax.train`.
    arguments: what follows it.
    folder: where the recipes lie that pages show.

  Raises:
    Exception: where a flag, a field, a recipe, a word or a value is wrong.
  """
  spelt = [
      a.replace('--config.ppo.from=', '--config.ppo.from_run=')
      for a in arguments
      if a not in _ANSWERED
  ]
  command = command_of(module)
  if command.recipe and not any(a.startswith('--config=') for a in spelt):
    spelt.insert(0, '--config=configs/tiny.py')
  argv = [module, *spelt]
  values = flags.FlagValues()
  absl_flags.define((*command.flags, *command.processes), values)
  for flag in command.recipe:
    if '.' not in flag.name:  # config.FIELD comes with it
      config_flags.DEFINE_config_file(
          flag.name, None, '', flag_values=values, sys_argv=argv
      )
      values[flag.name].parser = _Recipe(folder)
  if rest := values(argv)[1:]:
    raise ValueError(f'unexpected arguments: {rest}')
  return values


def words(line: str) -> list[str]:
  """The words of a command line, as bash reads them."""
  return shlex.split(line.replace("$'", "'"), comments=True)


@functools.cache
def is_field(name: str) -> bool:
  """Whether `ppo.kl_coef` or `ppo.optim` is a field or a block of a config."""
  node = config_lib.base()
  for part in name.replace('ppo.from', 'ppo.from_run').split('.'):
    if not hasattr(node, 'keys') or part not in node:
      return False
    node = node[part]
  return True


@functools.cache
def is_code(name: str) -> bool:
  """Whether `macro.aggregate.pool` is a module, function or table."""
  parts = name.removeprefix('ma_rlhf_jax.').split('.')
  base = ROOT if parts[0] == 'tests' else PACKAGE
  for count in range(len(parts), -1, -1):
    path = base.joinpath(*parts[:count])
    rest = parts[count:]
    files = (path.with_suffix('.py'), path / '__init__.py')
    if file := next((f for f in files if f.is_file()), None):
      tree = ast.parse(file.read_text())
      return not rest or (len(rest) == 1 and rest[0] in set(_names(tree)))
  return False


def _names(tree: ast.Module) -> Iterator[str]:
  """What a module defines."""
  for node in tree.body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
      targets = getattr(node, 'targets', None) or [node.target]
      yield from (t.id for t in targets if isinstance(t, ast.Name))
