"""Names of a table, and functions of the user's own."""

import pathlib
import sys

import pytest

from ma_rlhf_jax import registry

_TABLE = {'one': 1, 'two': 2}


@pytest.fixture(autouse=True)
def _modules(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """`mine:double`, and modules that cannot be imported."""
  (tmp_path / 'mine.py').write_text(
      'SIZE = 3\ndef double(x):\n  return 2 * x\n'
  )
  (tmp_path / 'needy.py').write_text('import no_such_dependency\n')
  package = tmp_path / 'rooms'
  package.mkdir()
  (package / '__init__.py').write_text('')
  (package / 'inner.py').write_text('def triple(x):\n  return 3 * x\n')
  monkeypatch.syspath_prepend(str(tmp_path))
  for name in ('mine', 'needy', 'rooms', 'rooms.inner'):
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_path_has_a_colon() -> None:
  assert registry.is_path('mine:double') and not registry.is_path('two')


def test_a_key_of_the_table_comes_first() -> None:
  assert registry.resolve(_TABLE, 'two') == 2
  table = {**_TABLE, 'mine:double': 5}
  assert registry.resolve(table, 'mine:double') == 5


def test_any_other_name_is_a_function_of_a_module() -> None:
  assert registry.resolve(_TABLE, 'mine:double')(21) == 42
  assert registry.load('rooms.inner:triple')(5) == 15


_WRONG = {
    'three': "ppo.x='three' must be one of one, two, or module:function",
    'mine:': "ppo.x='mine:' must be module:function",
    ':double': "ppo.x=':double' must be module:function",
    'mine:halve': "has no function 'halve'",
    'mine:SIZE': "has no function 'SIZE'",
    'nowhere:f': "no module 'nowhere' in the current folder",
    'nowhere.inner:f': "no module 'nowhere.inner' in the current folder",
    'rooms.outer:f': "no module 'rooms.outer' in the current folder",
    'needy:f': "ModuleNotFoundError: No module named 'no_such_dependency'",
}


@pytest.mark.parametrize(('name', 'message'), _WRONG.items())
def test_a_name_that_cannot_be_used_says_why(name: str, message: str) -> None:
  with pytest.raises(ValueError) as error:
    registry.resolve(_TABLE, name, 'ppo.x')
  assert message in str(error.value)
  assert f'ppo.x={name!r}' in str(error.value)
  assert registry.problem(_TABLE, name, 'ppo.x') == str(error.value)


@pytest.mark.parametrize('name', ['one', 'mine:double', 'rooms.inner:triple'])
def test_a_name_that_can_be_used_is_no_problem(name: str) -> None:
  assert registry.problem(_TABLE, name, 'ppo.x') == ''


def test_what_a_function_takes_is_checked_before_it_is_called() -> None:
  assert registry.load('mine:double', 'ppo.x', ('x',))(2) == 4
  with pytest.raises(ValueError, match=r"mine:double' must take \(a, b\)"):
    registry.load('mine:double', 'ppo.x', ('a', 'b'))
  problem = registry.problem(('one',), 'mine:double', 'ppo.x', ('a', 'b'))
  assert problem.endswith('and is (x)')


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('def f(:\n', 'SyntaxError'),
        ('undefined\n', 'NameError'),
        ('1 / 0\n', 'ZeroDivisionError'),
    ],
)
def test_a_module_that_cannot_be_run_is_one_line(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    words: str,
) -> None:
  (tmp_path / 'broken_module.py').write_text(text)
  monkeypatch.delitem(sys.modules, 'broken_module', raising=False)
  with pytest.raises(
      ValueError, match=f'importing broken_module failed, {words}'
  ):
    registry.load('broken_module:f', 'reward')


def test_a_module_without_a_file_says_what_it_lacks() -> None:
  with pytest.raises(ValueError, match="module sys has no function 'nothing'"):
    registry.load('sys:nothing', 'reward')
