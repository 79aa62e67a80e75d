"""Every recipe is short, says how to run it, and passes validation."""

import ast
import importlib.util
import pathlib
import re
import types

import jax
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import switches, validation
from ma_rlhf_jax.data import tasks
from ma_rlhf_jax.parallel.mesh import make_mesh
from ma_rlhf_jax.planning import abstract
from ma_rlhf_jax.rollout import decode
from ma_rlhf_jax.training import automatic
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[1]
_RECIPES = sorted(
    path for path in (_ROOT / 'configs').glob('*.py') if path.stem != '__init__'
)
_NAMES = [path.stem for path in _RECIPES]
_PUBLISHED = [path for path in _RECIPES if path.stem != 'tiny']


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


def test_every_published_checkpoint_has_its_recipe() -> None:
  tasks = {
      'tldr': ('2b', '7b', '27b'),
      'hh': ('2b', '7b'),
      'webgpt': ('2b', '7b'),
      'apps': ('2b', '7b'),
  }
  wanted = {f'{task}_{size}' for task, sizes in tasks.items() for size in sizes}
  assert wanted == {path.stem for path in _PUBLISHED}


@pytest.mark.parametrize('path', _PUBLISHED, ids=lambda path: path.stem)
def test_a_published_recipe_passes_validation_with_every_word(
    path: pathlib.Path,
) -> None:
  for word in (*switches.WORDS, 'authors,ngram=3', 'lora,paper'):
    assert validation.problems(_load(path).get_config(word)) == []


@pytest.mark.parametrize('path', _PUBLISHED, ids=lambda path: path.stem)
def test_a_published_recipe_says_what_its_figures_mean(
    path: pathlib.Path,
) -> None:
  docstring = ast.get_docstring(ast.parse(path.read_text()))
  config = _load(path).get_config()
  words = ' '.join(docstring.split())
  averaged = f'{config.ppo.kl_coef / config.macro.ngram:g}'
  assert f'{config.ppo.kl_coef:g} / {config.macro.ngram} = {averaged}' in words
  assert f'--config=configs/{path.name}:authors' in words
  assert f'PPO {_updates(path)} of {config.ppo.batch_size} prompts' in words
  assert 'micro-steps' in words and 'planned for v' in words


# Rows to train on, of which the PPO part makes `data.parts[2]` of the sum.
_ROWS = {'tldr': 92_858, 'hh': 112_052, 'webgpt': 18_599, 'apps': 5000}


def _updates(path: pathlib.Path) -> int:
  config = _load(path).get_config()
  parts = config.data.parts
  rows = _ROWS[config.data.task] * parts[2] / sum(parts)
  return config_lib.num_steps(config.ppo, int(rows))


@pytest.mark.parametrize('path', _PUBLISHED, ids=lambda path: path.stem)
def test_the_warm_up_in_the_docstring_is_that_of_the_config(
    path: pathlib.Path,
) -> None:
  config = _load(path).get_config()
  words = ' '.join(ast.get_docstring(ast.parse(path.read_text())).split())
  updates = _updates(path)
  told = re.search(r'warm-up (\d+) \((\d+) updates\)', words)
  micro_steps, warm = map(int, told.groups()) if told else (0, 0)
  assert told or 'no warm-up' in words
  for optim in (config.ppo.optim, config.critic.optim):
    assert round(optim.warmup_ratio * updates) == warm
  # One micro-step has 8 prompts.
  every = config.ppo.batch_size // 8
  assert round(micro_steps / every) == warm


@pytest.mark.parametrize('path', _PUBLISHED, ids=lambda path: path.stem)
def test_a_recipe_says_where_its_rows_cannot_be_read(
    path: pathlib.Path,
) -> None:
  task = _load(path).get_config().data.task
  says = 'its rows cannot be read yet' in path.read_text()
  try:
    tasks.check_task(task)
  except ValueError:
    assert says
  else:
    assert not says


@pytest.mark.slow
@pytest.mark.parametrize('path', _PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize('arguments', ['', 'lora', 'authors', 'rloo'])
def test_all_stages_of_every_recipe_have_their_shapes(
    path: pathlib.Path, arguments: str
) -> None:
  config = automatic.fixed(_load(path).get_config(arguments))
  prompt_len, response_len = config_lib.lengths(config)
  assert (prompt_len, response_len) == (
      600 if config.data.task == 'apps' else 512,
      512,
  )
  mesh = make_mesh(config.mesh)
  assert mesh.shape['fsdp'] * mesh.shape['tensor'] == jax.device_count()
  spec = tiny.spec(
      config, mesh=mesh, prompt_len=prompt_len, response_len=response_len
  )
  rows = dict.fromkeys(config.stages, 8)
  with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
    # Stages of decoding have the same shapes, and are long to trace.
    patch.setattr(decode, 'stage_limits', lambda tokens: (tokens,))
    vocab_size = config.tokenizer.vocab_size
    stages = abstract.programs_of(spec, vocab_size, rows)
    assert list(stages) == [s for s in config.stages if s != 'evaluate']
    for stage in stages.values():
      for name, (function, args) in stage.programs.listing().items():
        made = jax.eval_shape(function, *args)
        if (
            '/update' in name or name == 'ppo/one_pass'
        ):  # of the same shapes, so that it can be donated
          same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
          assert jax.tree.all(jax.tree.map(same, args[0], made[0])), name
