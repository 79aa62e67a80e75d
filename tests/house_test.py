"""Imports point up the house, and every module has its test file."""

import ast
import graphlib
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGE = 'ma_rlhf_jax'

# Data flows down this list; a module imports from its own line or above. The
# last line is the shell, which may import anything.
_ROOMS = (
    ('config', 'config_fields', 'stage_fields', 'fields', 'structs')
    + (
        'masking',
        'switches',
        'arguments',
        'atomic_file',
        'interrupts',
        'manifest',
        'registry',
    ),
    ('parallel',),
    ('commands',),
    ('workdir', 'workdir_lock'),
    ('data',),
    ('models',),
    ('macro',),
    ('rollout',),
    ('objective',),
    ('scorers',),
    ('training',),
    ('ppo',),
    ('evaluation',),
    ('generation',),
    ('publishing',),
    ('validation',),
    ('planning', 'benching'),
    (
        'recipe',
        'recipe_flag',
        'tools',
        'train',
        'generate',
        'evaluate',
        'export',
    )
    + ('configs', 'cluster_flags', '__main__'),
)
_UNTESTED = {
    'structs.py': 'declares fields and does nothing',
}

Graph = dict[str, set[str]]


def _module(path: pathlib.PurePath) -> str:
  """`ma_rlhf_jax.data.tasks` of `ma_rlhf_jax/data/tasks.py`."""
  parts = path.with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def _imported(module: str, is_package: bool, source: str) -> set[str]:
  """Dotted names that `source` imports, wherever in the file it does."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      up = node.level - is_package
      parents = module.split('.')[: -up or None] if node.level else []
      base = [*parents, *filter(None, [node.module])]
      names |= {'.'.join([*base, alias.name]) for alias in node.names}
  return names


def _graph(sources: dict[str, str]) -> Graph:
  """Which modules of the package each module imports.

  Args:
    sources: text of each file by its path, as in `ma_rlhf_jax/config.py`.
  """
  paths = {_module(pathlib.PurePath(path)): path for path in sources}
  graph = {}
  for module, path in paths.items():
    is_package = path.endswith('__init__.py')
    names = _imported(module, is_package, sources[path])
    # The last part of a name may be a function or class of the module.
    names |= {name.rpartition('.')[0] for name in names - paths.keys()}
    graph[module] = names & paths.keys() - {module, _PACKAGE}
  return graph


def _rank(module: str) -> int:
  """Line of `_ROOMS` that a module belongs to; -1 for the package itself."""
  room = (module.split('.') + [''])[1]
  ranks = [i for i, rooms in enumerate(_ROOMS) if room in rooms]
  assert ranks or not room, f'{module}: give {room!r} a line in _ROOMS'
  return ranks[0] if ranks else -1


def _upward(graph: Graph) -> list[str]:
  """Imports of a lower line of the list, one text each."""
  return [
      f'{module} imports {name}'
      for module, names in sorted(graph.items())
      for name in sorted(names)
      if _rank(name) > _rank(module)
  ]


def _cycle(graph: Graph) -> list[str]:
  """The modules of one import cycle; empty where there is none."""
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    return error.args[1]
  return []


@pytest.fixture(scope='module')
def house() -> Graph:
  """The imports of this package."""
  paths = sorted((_ROOT / _PACKAGE).rglob('*.py'))
  assert len(paths) > 3
  return _graph({str(p.relative_to(_ROOT)): p.read_text() for p in paths})


def test_imports_are_found_wherever_they_stand() -> None:
  graph = _graph(
      {
          'ma_rlhf_jax/__init__.py': '',
          'ma_rlhf_jax/config.py': '',
          'ma_rlhf_jax/data/__init__.py': 'from ..config import base',
          'ma_rlhf_jax/data/tasks.py': 'def f():\n  import ma_rlhf_jax.config',
          'ma_rlhf_jax/data/batches.py': (
              'import os\n'
              'from ma_rlhf_jax.data import tasks as t\n'
              'from ma_rlhf_jax.config import base\n'
          ),
          'ma_rlhf_jax/data/rows.py': 'from . import batches, tasks',
      }
  )
  assert graph == {
      'ma_rlhf_jax': set(),
      'ma_rlhf_jax.config': set(),
      'ma_rlhf_jax.data': {'ma_rlhf_jax.config'},
      'ma_rlhf_jax.data.tasks': {'ma_rlhf_jax.config'},
      'ma_rlhf_jax.data.batches': {
          'ma_rlhf_jax.config',
          'ma_rlhf_jax.data.tasks',
      },
      'ma_rlhf_jax.data.rows': {
          'ma_rlhf_jax.data.batches',
          'ma_rlhf_jax.data.tasks',
      },
  }


def test_an_import_of_a_lower_room_is_reported() -> None:
  graph = {
      'ma_rlhf_jax.models.gemma': {'ma_rlhf_jax.config'},
      'ma_rlhf_jax.data.tasks': {'ma_rlhf_jax.models.gemma'},
      'ma_rlhf_jax.train': {'ma_rlhf_jax.tools.plan'},
  }
  assert _upward(graph) == [
      'ma_rlhf_jax.data.tasks imports ma_rlhf_jax.models.gemma'
  ]


def test_a_cycle_is_reported() -> None:
  assert _cycle({'a': {'b'}, 'b': {'c'}, 'c': set()}) == []
  assert set(_cycle({'a': {'b'}, 'b': {'c'}, 'c': {'b'}})) == {'b', 'c'}


def test_imports_point_up_the_house(house: Graph) -> None:
  assert _upward(house) == []


def test_no_import_cycles(house: Graph) -> None:
  assert _cycle(house) == []


def test_every_module_has_its_test_file() -> None:
  modules = [
      path.relative_to(_ROOT / _PACKAGE)
      for path in sorted((_ROOT / _PACKAGE).rglob('*.py'))
      if path.name != '__init__.py'
  ]
  missing = [
      str(path)
      for path in modules
      if not (_ROOT / 'tests' / path.with_stem(f'{path.stem}_test')).is_file()
  ]
  assert missing == sorted(_UNTESTED)


def test_package_files_hold_no_code() -> None:
  # They have no test file, and are imported with any module beside them. Only
  # the version stands in one.
  inits = sorted((_ROOT / _PACKAGE).rglob('__init__.py'))
  with_code = [
      str(path.relative_to(_ROOT))
      for path in inits
      if any(
          not isinstance(node, ast.Expr)
          and not ast.unparse(node).startswith('__version__ = ')
          for node in ast.parse(path.read_text()).body
      )
  ]
  assert inits and with_code == []
