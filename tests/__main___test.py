"""`python -m ma_rlhf_jax` lists the commands."""

import ast
import pathlib
import re

import pytest

from ma_rlhf_jax import __main__ as listing
from ma_rlhf_jax import __version__
from tests import helped

_PACKAGE = helped.ROOT / 'ma_rlhf_jax'


def _commands() -> set[str]:
  """The modules that are called as commands, found in the files."""
  paths = [*_PACKAGE.glob('*.py'), *(_PACKAGE / 'tools').glob('*.py')]
  return {
      '.'.join(path.relative_to(_PACKAGE).with_suffix('').parts)
      for path in paths
      if "if __name__ == '__main__':" in path.read_text()
      and path.stem != '__main__'
  }


def test_every_command_is_listed_with_a_line() -> None:
  text = helped.run('ma_rlhf_jax', '--help')
  listed = re.findall(r'^  (\S+) {2,}[A-Z].*\.$', text, re.M)
  assert set(listed) == _commands() and len(listed) == 9
  assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        ([], 'usage: python -m ma_rlhf_jax.COMMAND'),
        (['-h'], 'usage: python -m ma_rlhf_jax.COMMAND'),
        (['--version'], f'ma_rlhf_jax {__version__}\n'),
    ],
)
def test_it_answers_on_the_standard_output(
    words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
  listing.main(words)
  assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ('word', 'name'), [('plan', 'tools.plan'), ('train', 'train')]
)
def test_a_command_after_a_blank_is_answered_by_its_name(
    word: str, name: str
) -> None:
  with pytest.raises(SystemExit) as ended:
    listing.main([word])
  assert str(ended.value).endswith(f'python -m ma_rlhf_jax.{name}')


def test_the_version_has_one_source() -> None:
  setup = ast.parse((helped.ROOT / 'setup.py').read_text())
  (version,) = [
      keyword.value
      for node in ast.walk(setup)
      if isinstance(node, ast.Call)
      for keyword in node.keywords
      if keyword.arg == 'version'
  ]
  assert not isinstance(version, ast.Constant)
  assert pathlib.Path(_PACKAGE / '__init__.py').read_text().count(__version__)
