"""Every recipe is short, says how to run it, and passes validation."""

import ast
import importlib.util
import pathlib
import types

import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import validation

_ROOT = pathlib.Path(__file__).parents[1]
_RECIPES = sorted(
    path for path in (_ROOT / 'configs').glob('*.py') if path.stem != '__init__'
)
_NAMES = [path.stem for path in _RECIPES]


def _load(path: pathlib.Path) -> types.ModuleType:
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_default_recipe_is_there() -> None:
  assert 'tiny' in _NAMES


@pytest.mark.parametrize('path', _RECIPES, ids=_NAMES)
def test_a_recipe_passes_validation_with_every_argument(
    path: pathlib.Path,
) -> None:
  get_config = _load(path).get_config
  for arguments, ngram in (('', None), ('ngram=1', 1), ('ngram=7,seed=3', 7)):
    config = get_config(arguments)
    assert validation.problems(config) == []
    assert ngram is None or config.macro.ngram == ngram
    assert config.is_locked
  assert get_config() == get_config('')
  assert config.seed == 3


@pytest.mark.parametrize('path', _RECIPES, ids=_NAMES)
def test_a_recipe_has_the_fields_of_base_only(path: pathlib.Path) -> None:
  made = config_lib.flatten(_load(path).get_config())
  assert made.keys() == config_lib.flatten(config_lib.base()).keys()


@pytest.mark.parametrize('path', _RECIPES, ids=_NAMES)
def test_a_recipe_is_short_and_says_how_to_run_it(path: pathlib.Path) -> None:
  text = path.read_text()
  docstring = ast.get_docstring(ast.parse(text))
  code = text.split('"""')[2].strip().splitlines()
  assert len(code) <= 40
  assert f'--config=configs/{path.name}' in docstring
  assert 'Hardware:' in docstring
