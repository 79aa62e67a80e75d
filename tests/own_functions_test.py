"""The examples of the pages, as a user's own files: estimator, reward, rule."""

import dataclasses
import importlib
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import masking, recipe, registry, validation
from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import advantage
from ma_rlhf_jax.ppo import stage as stage_lib
from ma_rlhf_jax.ppo import step as step_lib
from ma_rlhf_jax.scorers.functions import RewardError, TextReward
from ma_rlhf_jax.structs import Array, MacroActions, Models, Scored
from ma_rlhf_jax.training import judge
from tests import pages, tiny, tolerance

# File -> the room whose page shows it.
_SHOWN = {
    'vapo.py': 'objective',
    'my_rewards.py': 'scorers',
    'my_rules.py': 'macro',
}
_NAMED = {
    'ppo.advantage': 'vapo:adaptive',
    'reward': 'my_rewards:cheerful',
    'macro.termination': 'my_rules:falls',
}


def _code(name: str) -> str:
  page = pages.PACKAGE / _SHOWN[name] / 'README.md'
  return pages.files(page.read_text())[name]


@pytest.fixture
def folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
  """A folder with the files, which nothing can import from yet."""
  for name in _SHOWN:
    (tmp_path / name).write_text(_code(name))
    monkeypatch.delitem(sys.modules, name.removesuffix('.py'), raising=False)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.setattr(registry, '_folders', [])  # a recipe adds to it
  return tmp_path


@pytest.fixture
def module(folder: pathlib.Path) -> Any:
  """Imports one of the files by its name."""
  sys.path.append(str(folder))
  return importlib.import_module


def _config(**fields: Any) -> ConfigDict:
  config = config_lib.base()
  flat = {name.replace('__', '.'): value for name, value in fields.items()}
  config.update_from_flattened_dict(_NAMED | flat)
  return config


@pytest.mark.parametrize('name', _SHOWN)
def test_an_example_has_at_most_15_lines(name: str) -> None:
  assert 5 < len(_code(name).splitlines()) <= 15


# The estimator.

_COLUMNS = 60


def _rows() -> tuple[Array, Array, MacroActions]:
  """29 macro actions of 2 tokens, 25 of which the last has 1, and 3."""
  tokens_B1 = np.array([58, 49, 6])[:, None]
  mask_BT = jnp.asarray(np.arange(_COLUMNS) < tokens_B1)
  drawn = np.random.default_rng(0).normal(size=(2, *mask_BT.shape))
  values_BT, rewards_BT = jnp.asarray(drawn.astype(np.float32))
  starts_BT = termination.fixed(mask_BT, ngram=2)
  macro = termination.macro_actions(starts_BT, mask_BT)
  return values_BT, rewards_BT, macro


def _by_loop(
    values_BT: Array, rewards_BT: Array, macro: MacroActions, gamma: float
) -> np.ndarray:
  """Advantages by the formula of arXiv 2504.05118, one step at a time."""
  values_BT, rewards_BT = (
      np.asarray(x, np.float64) for x in (values_BT, rewards_BT)
  )
  wanted_BT = np.zeros(values_BT.shape)
  for b, starts_T in enumerate(np.asarray(macro.starts_BT)):
    count = int(np.asarray(macro.mask_BT)[b].sum())
    starts = [*np.flatnonzero(starts_T), count]
    length = len(starts) - 1
    gae_lambda = max(0.0, 1 - 1 / (0.05 * length))
    later_advantage = later_value = 0.0
    for m in reversed(range(length)):
      tokens = slice(starts[m], starts[m + 1])
      reward, value = rewards_BT[b, tokens].sum(), values_BT[b, starts[m]]
      delta = reward + gamma * later_value - value
      later_advantage = delta + gamma * gae_lambda * later_advantage
      later_value = value
      wanted_BT[b, tokens] = later_advantage
  return wanted_BT


def test_the_estimator_is_the_formula_of_the_paper(module: Any) -> None:
  values_BT, rewards_BT, macro = _rows()
  objective = tiny.objective(gamma=0.9)
  adaptive = jax.jit(
      lambda values_BT, rewards_BT: module('vapo').adaptive(
          values_BT, rewards_BT, macro, objective
      )
  )
  bounds = tolerance.of_sums(adaptive, (values_BT, rewards_BT), _COLUMNS)
  wanted_BT = _by_loop(values_BT, rewards_BT, macro, 0.9)
  tolerance.assert_close(adaptive(values_BT, rewards_BT), wanted_BT, bounds)


def test_each_response_has_a_lambda_of_its_own(module: Any) -> None:
  values_BT, rewards_BT, macro = _rows()
  objective = tiny.objective(gamma=0.9)
  found_BT = module('vapo').adaptive(values_BT, rewards_BT, macro, objective)
  # 1 - 1 / (.05 * 29) = .45 / 1.45, 1 - 1 / 1.25 = .2, and 0.
  for row, gae_lambda in enumerate((0.45 / 1.45, 0.2, 0.0)):
    fixed = dataclasses.replace(objective, gae_lambda=gae_lambda)
    other_BM, _ = advantage.macro_gae(values_BT, rewards_BT, macro, fixed)
    close_B = np.abs(other_BM[:, 0] - found_BT[:, 0]) < 1e-5
    assert close_B.tolist() == [row == b for b in range(3)]


def test_the_estimator_never_reads_padding(module: Any) -> None:
  values_BT, rewards_BT, macro = _rows()
  nan = lambda x_BT: jnp.where(macro.mask_BT, x_BT, jnp.nan)
  call = lambda *x: module('vapo').adaptive(*x, macro, tiny.objective())
  clean_BT = call(values_BT, rewards_BT)
  np.testing.assert_array_equal(call(nan(values_BT), nan(rewards_BT)), clean_BT)


# The reward.


def test_the_reward_is_counted_by_hand(folder: pathlib.Path) -> None:
  sys.path.append(str(folder))
  reward = TextReward.from_config(_config())
  responses = ['A warm, kind dog.', 'Rude!', '', 'so sick of it but fine']
  # 2 of 4, -1 of 1, no word, and 0 of 6.
  found_B = reward(['p'] * 4, responses, [{}] * 4)
  np.testing.assert_array_equal(found_B, np.float32([0.5, -1, 0, 0]))
  assert found_B.dtype == np.float32


def test_a_reward_that_is_no_number_is_refused(folder: pathlib.Path) -> None:
  sys.path.append(str(folder))
  text = _code('my_rewards.py').replace('max(1, len(words))', 'len(words)')
  (folder / 'my_rewards.py').write_text(text)
  reward = TextReward.from_config(_config())
  with pytest.raises(RewardError) as error:
    reward(['p', 'p'], ['fine', ''], [{}, {}])
  line = "reward='my_rewards:cheerful' failed: ZeroDivisionError: division by"
  assert str(error.value).startswith(line)


# The rule.


def test_the_rule_reads_values(module: Any) -> None:
  values_BT = jnp.array([[0.2, 1, 0.4, 0.1, -0.5], [3, 2, 9, 9, 9]])
  mask_BT = jnp.array([[True] * 5, [True, True, False, False, False]])
  inputs = termination.TerminationInputs(
      mask_BT,
      jnp.zeros((2, 5)),
      jax.random.split(jax.random.key(0), 2),
      scored=Scored(values_BT=jnp.where(mask_BT, values_BT, 0)),
  )
  settings = termination.TerminationSettings('my_rules:falls')
  module('my_rules')
  macro = termination.segment(inputs, settings)
  # Falls of .6 and .6 in row 0, of 1 in row 1.
  assert macro.ids_BT.tolist() == [[0, 0, 1, 1, 2], [0, 1, 5, 5, 5]]


# A config that names them.


def test_names_are_found_in_the_folder_of_the_recipe(
    folder: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.chdir(tmp_path_factory.mktemp('elsewhere'))
  found = validation.problems(_config())
  assert len(found) == 3 and all('no module' in line for line in found)
  lines = [f'  config.{name} = {value!r}' for name, value in _NAMED.items()]
  path = folder / 'mine.py'
  path.write_text(
      'from ma_rlhf_jax.config import base\n\ndef get_config():\n'
      '  config = base()\n' + '\n'.join(lines) + '\n  return config\n'
  )
  assert validation.problems(recipe.load(str(path))) == []
  assert validation.problems(_config(reward='model+my_rewards:cheerful')) == []


def test_names_are_found_in_the_current_folder(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(folder)
  recipe.load(str(pages.ROOT / 'configs' / 'tiny.py'))
  assert validation.problems(_config()) == []


@pytest.mark.parametrize(
    ('field', 'value', 'cure'),
    [
        (
            'reward',
            'my_rewards:gloomy',
            "my_rewards.py has no function 'gloomy'",
        ),
        ('reward', 'model+my_reward:cheerful', "no module 'my_reward' in the"),
        ('reward', 'cheerful', 'must be one of model, or module:function'),
        ('ppo.advantage', 'vapo:', 'must be module:function'),
        ('ppo.advantage', 'vapor:adaptive', "no module 'vapor' in the current"),
        ('macro.termination', 'falls', 'or module:function'),
        ('macro.termination', 'my_rules:jnp', 'has no function'),
    ],
)
def test_a_wrong_name_is_one_line_with_the_cure(
    folder: pathlib.Path, field: str, value: str, cure: str
) -> None:
  sys.path.append(str(folder))
  (line,) = validation.problems(_config(**{field: value}))
  wrong = value.rpartition('+')[2]
  assert line.startswith(f'{field}={wrong!r}') and cure in line


# A step of training.

_WORDS = (
    '~ . ^ kind mean warm dog cat it was a so the and not one two day run to'
)


class _Tokenizer(tiny.Tokenizer):
  """Says ids as words, some of which the lexicon knows."""

  def decode(self, ids: list[int], **unused: Any) -> str:
    return ' '.join(_WORDS.split()[i] for i in ids)


def test_a_step_uses_reward_estimator_and_rule(folder: pathlib.Path) -> None:
  sys.path.append(str(folder))
  copy = lambda params: jax.tree.map(jnp.array, params)  # steps donate
  params = Models(
      policy=copy(tiny.params('policy', 0)),
      ref_policy=tiny.params('policy', 2),
      critic=copy(tiny.params('scalar', 1)),
      reward_model=None,
  )
  config = tiny.config(**{k.replace('.', '__'): v for k, v in _NAMED.items()})
  run = tiny.run(folder, config, tokenizer=_Tokenizer())
  configs = Models(*[tiny.SHAPE] * 3, None)
  stage = stage_lib.PPO(run, configs, params)
  with jax.set_mesh(run.mesh):
    prompts = judge.prompt_batch(run, stage.data, stage.rows(0))
    rollout = step_lib.respond(stage.programs, stage.states, prompts, 0)
    tokens_BT = np.asarray(masking.response_tokens(rollout.sequences))
    mask_BT = np.asarray(rollout.sequences.response_mask_BT)
    _, metrics = stage.step(stage.states, 0)
  # Ids 3 and 5 are kind and warm, 4 is mean; ids from 3 on are words.
  sums = np.isin(tokens_BT, (3, 5)) * 1.0 - (tokens_BT == 4)
  words = (tokens_BT > 2) & mask_BT
  scores = np.where(words, sums, 0).sum(1) / np.maximum(1, words.sum(1))
  assert np.any(scores)
  np.testing.assert_allclose(
      metrics['objective/score'], scores.mean(), rtol=1e-5
  )
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(metrics))
