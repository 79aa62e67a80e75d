"""Recipes, and what is said of those that cannot be used."""

import pathlib

import pytest

from ma_rlhf_jax import recipe

_HEAD = 'from ma_rlhf_jax.config import apply_arguments, base\n'
_GET = "def get_config(arguments=''):\n"


def _file(tmp_path: pathlib.Path, text: str) -> str:
  path = tmp_path / 'mine.py'
  path.write_text(text)
  return str(path)


def test_a_recipe_is_read_with_its_arguments(tmp_path: pathlib.Path) -> None:
  body = '  c = base()\n  c.seed = 3\n  return apply_arguments(c, arguments)\n'
  path = _file(tmp_path, _HEAD + _GET + body)
  assert recipe.load(path).seed == 3
  config = recipe.load(f'{path}:ngram=7')
  assert config.macro.ngram == 7 and config.is_locked


@pytest.mark.parametrize(
    ('text', 'line', 'cause'),
    [
        (_HEAD + _GET + '  c = base()\n  c.ppo.kl = 1\n', 4, "no field 'kl'"),
        (_HEAD + _GET + '  c = base()\n  c.sed.x = 1\n', 4, 'sed'),
        (_HEAD + 'x = 1\n', None, 'get_config'),
        ('\nimport not_here\n', 2, "No module named 'not_here'"),
        (_HEAD + _GET + '  base()\n', 2, 'returned NoneType, not a config'),
        (_GET + '  return {}\n', 1, 'returned dict, not a config'),
        (_GET + "  raise RuntimeError('why\\nmore')\n", 2, 'RuntimeError: why'),
        ('\n\ndef get_config(:\n', 3, 'SyntaxError'),
        ("open('/not/here')\n", 1, "'/not/here'"),
        ('x = 1\n1 / 0\n', 2, 'ZeroDivisionError'),
        (
            _HEAD + _GET + "  c = base()\n  c.ppo.kl_coef = 'x'\n",
            4,
            'kl_coef',
        ),
        (
            'from ml_collections import ConfigDict\n'
            + _GET
            + "  return ConfigDict({'seed': 1})\n",
            2,
            'base()',
        ),
        ('x = "\0"\n', None, 'null bytes'),
        (_GET + '  raise KeyError\n', 2, 'KeyError'),
    ],
)
def test_a_recipe_that_fails_is_named_with_line_and_cause(
    tmp_path: pathlib.Path, text: str, line: int | None, cause: str
) -> None:
  path = _file(tmp_path, text)
  with pytest.raises(recipe.RecipeError) as caught:
    recipe.load(path)
  message = str(caught.value)
  where = f'{path}, line {line}: ' if line else f'{path}'
  assert message.startswith(where) and cause in message
  assert len(message.splitlines()) <= 3


def test_a_recipe_that_takes_no_arguments_is_told_how(
    tmp_path: pathlib.Path,
) -> None:
  path = _file(tmp_path, _HEAD + 'def get_config():\n  return base()\n')
  assert recipe.load(path).seed == 0
  with pytest.raises(recipe.RecipeError, match='line 2.*arguments'):
    recipe.load(f'{path}:ngram=3')


def test_a_wrong_argument_is_not_the_fault_of_the_file(
    tmp_path: pathlib.Path,
) -> None:
  body = '  return apply_arguments(base(), arguments)\n'
  path = _file(tmp_path, _HEAD + _GET + body)
  with pytest.raises(recipe.RecipeError) as caught:
    recipe.load(f'{path}:n=1')
  assert str(caught.value).startswith("recipe argument 'n' is unknown")


def test_a_recipe_may_end_the_process(tmp_path: pathlib.Path) -> None:
  with pytest.raises(SystemExit):
    recipe.load(_file(tmp_path, 'raise SystemExit\n'))
