"""A stage goes on from the weights that it started with, or not at all."""

import json
import pathlib

import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax.models import exporting
from ma_rlhf_jax.training import origins
from ma_rlhf_jax.training.products import SourceError
from ma_rlhf_jax.training.run import Run
from tests import products, tiny
from tests.models.drawn import draw


def _save(folder: pathlib.Path, kind: str, seed: int) -> None:
  words = products.tokenizer(folder.parent / 'tokenizer')
  params = draw(kind, products.SHAPE, seed)
  exporting.save(folder, params, products.SHAPE, kind, words, overwrite=True)


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Run:
  for name, kind in (('base', 'policy'), ('scores', 'scalar')):
    _save(tmp_path / name, kind, 1)
  config = tiny.config(
      sft__init=str(tmp_path / 'base'),
      ppo__policy_init=str(tmp_path / 'base'),
      ppo__reward_model=str(tmp_path / 'scores'),
  )
  return tiny.run(tmp_path / 'run', config)


def _saved(run: Run, stage: str, step: int) -> None:
  (run.workdir / stage / 'checkpoints' / str(step)).mkdir(parents=True)


@pytest.mark.parametrize(
    'stage, swapped, kind, role',
    [
        ('sft', 'base', 'policy', 'policy'),
        ('reward_model', 'base', 'policy', 'policy'),
        ('ppo', 'base', 'policy', 'reference policy'),
        ('ppo', 'scores', 'scalar', 'reward model'),
    ],
)
def test_a_swapped_folder_is_refused_and_named(
    run: Run,
    tmp_path: pathlib.Path,
    stage: str,
    swapped: str,
    kind: str,
    role: str,
) -> None:
  origins.check(run, stage)
  _saved(run, stage, 5)
  origins.check(run, stage)
  _save(tmp_path / swapped, kind, 2)
  with pytest.raises(SourceError) as caught:
    origins.check(run, stage)
  message = str(caught.value)
  assert f'stage {stage!r} cannot go on after step 5' in message
  assert f'{role} ({tmp_path / swapped})' in message
  _save(tmp_path / swapped, kind, 1)
  origins.check(run, stage)


def test_a_stage_without_a_checkpoint_may_start_from_anything(
    run: Run, tmp_path: pathlib.Path
) -> None:
  origins.check(run, 'sft')
  before = json.loads((run.workdir / 'sft' / 'origins.json').read_text())
  _save(tmp_path / 'base', 'policy', 2)
  origins.check(run, 'sft')
  after = json.loads((run.workdir / 'sft' / 'origins.json').read_text())
  assert before['policy']['path'] == after['policy']['path']
  assert before['policy'] != after['policy']


def test_random_weights_have_no_origin(tmp_path: pathlib.Path) -> None:
  run = tiny.run(tmp_path / 'run', tiny.config())
  origins.check(run, 'sft')
  assert manifest.read_sealed(run.workdir / 'sft' / 'origins.json') == {}
