"""Reads the Markdown pages: blocks of code, commands, flags, names, links.

Flags are read from the sources of the commands, which takes milliseconds where
importing them all takes half a minute.
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

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import recipe

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'ma_rlhf_jax'
PAGES = sorted(
    path
    for folder in ('.', 'configs', 'launch', 'tests', 'ma_rlhf_jax')
    for path in (ROOT / folder).glob('*.md' if folder == '.' else '**/*.md')
)
# Every command has them.
_COMMON = ('help', 'version')
# Kind in DEFINE_<kind> -> how a flag of that kind is defined.
_DEFINE = {
    'string': flags.DEFINE_string,
    'bool': flags.DEFINE_bool,
    'boolean': flags.DEFINE_bool,
    'integer': flags.DEFINE_integer,
    'float': flags.DEFINE_float,
    'list': flags.DEFINE_list,
    'multi_string': flags.DEFINE_multi_string,
    'enum': flags.DEFINE_string,
}
# Annotation of a field of a `Request`, each of which is a flag -> its kind.
_KINDS = {'bool': 'bool', 'int': 'integer', 'float': 'float'}


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


def recipes(text: str) -> dict[str, str]:
  """Name -> code of the recipes that a page shows, by their first comment."""
  named = {b.text: re.match(r'# (\w+\.py)\n', b.text) for b in blocks(text)}
  return {match[1]: code for code, match in named.items() if match}


def _file(module: str) -> pathlib.Path:
  return ROOT / (module.replace('.', '/') + '.py')


def _imported(tree: ast.Module) -> list[pathlib.Path]:
  """Files of the package that a module imports."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module:
      names |= {node.module}
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  paths = (_file(name) for name in names if name.startswith('ma_rlhf_jax'))
  return sorted(path for path in paths if path.is_file())


def _defined(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, str]]:
  """(name, kind) of the flags that calls and requests among nodes define."""
  for node in nodes:
    if isinstance(node, ast.ClassDef) and node.name == 'Request':
      for field in node.body:
        if isinstance(field, ast.AnnAssign):
          kind = _KINDS.get(ast.unparse(field.annotation), 'string')
          yield field.target.id, kind
    if not (isinstance(node, ast.Call) and node.args):
      continue
    if not isinstance(name := getattr(node.args[0], 'value', None), str):
      continue
    called = ast.unparse(node.func).rpartition('.')[2]
    if called == 'define':
      yield name, 'recipe'
    elif called.startswith('DEFINE_') and called[7:] in _DEFINE:
      yield name, called[7:]


def _at_import(tree: ast.Module) -> Iterator[ast.AST]:
  """What runs when a module is imported, and its classes."""
  for node in tree.body:
    if isinstance(node, (ast.Assign, ast.Expr)):
      yield from ast.walk(node)
    elif isinstance(node, ast.ClassDef):
      yield node


@functools.cache
def flags_of(module: str) -> dict[str, str]:
  """Flag -> kind of a command like `ma_rlhf_jax.train`.

  Raises:
    FileNotFoundError: if there is no such command.
  """
  tree = ast.parse(_file(module).read_text())
  known = dict(_defined(ast.walk(tree)))
  for path in _imported(tree):
    known |= dict(_defined(_at_import(ast.parse(path.read_text()))))
  return known | {name: 'bool' for name in _COMMON}


@functools.cache
def script_flags(script: str) -> frozenset[str]:
  """The flags of a script of `launch/`, without their dashes."""
  text = (ROOT / 'launch' / script).read_text()
  if '/common.sh"' in text:
    text += (ROOT / 'launch' / 'common.sh').read_text()
  return frozenset(re.findall(r'^\s*--(\w+)(?:=\*)?\)', text, re.M))


@functools.cache
def argparse_flags(path: pathlib.Path) -> frozenset[str]:
  """The flags that a script defines by argparse, pytest's options included."""
  found = re.findall(r"(?:argument|option)\(\s*'--(\w+)'", path.read_text())
  return frozenset(found)


@functools.cache
def all_flags() -> set[str]:
  """Every flag of every command, script and benchmark."""
  modules = ['train', 'generate', 'evaluate', 'export']
  modules += [f'tools.{path.stem}' for path in (PACKAGE / 'tools').glob('*.py')]
  known = {f for m in modules for f in flags_of(f'ma_rlhf_jax.{m}')}
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
  ]
  kinds = flags_of(module)
  if 'config' in kinds and not any(a.startswith('--config=') for a in spelt):
    spelt.insert(0, '--config=configs/tiny.py')
  argv = [module, *spelt]
  values = flags.FlagValues()
  for name, kind in kinds.items():
    if kind == 'recipe':
      config_flags.DEFINE_config_file(
          name, None, '', flag_values=values, sys_argv=argv
      )
      values[name].parser = _Recipe(folder)
    else:
      _DEFINE[kind](name, None, '', flag_values=values)
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
  if name == 'ma_rlhf_jax.__version__':
    return True
  parts = name.removeprefix('ma_rlhf_jax.').split('.')
  base = ROOT if parts[0] == 'tests' else PACKAGE
  for count in range(len(parts), 0, -1):
    path = base.joinpath(*parts[:count])
    rest = parts[count:]
    if path.is_dir():
      return not rest
    if path.with_suffix('.py').is_file():
      tree = ast.parse(path.with_suffix('.py').read_text())
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
