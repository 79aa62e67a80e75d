"""Which folder a name stands for, and which models are refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.generation import finished
from ma_rlhf_jax.training.products import SourceError
from tests import served, tiny
from tests.models.drawn import draw


@pytest.fixture(scope='module')
def store(tmp_path_factory: pytest.TempPathFactory) -> served.Store:
  return served.store(tmp_path_factory.mktemp('store'))


def _find(value: str, flag: str = 'model') -> finished.Finished:
  return finished.find(flag, value, 'float32')


@pytest.mark.parametrize(
    ('flag', 'name', 'stage'),
    [
        ('model', 'finished', 'ppo'),
        ('model', 'workdir', 'sft'),
        ('reward_model', 'workdir', 'reward_model'),
        ('model', 'policy', ''),
    ],
)
def test_a_workdir_stands_for_its_best_product(
    store: served.Store, flag: str, name: str, stage: str
):
  value = getattr(store, name)
  found = _find(value, flag)
  folder = pathlib.Path(value)
  assert found.folder == (folder / stage / 'hf' if stage else folder)
  assert found.source.stage == stage
  told = f'--{flag}={value}: '
  told += f'its stage {stage}, {folder / stage / "hf"}, ' if stage else ''
  size = f'{served.RANDOM.num_params:,}'
  assert found.describe() == f'{told}{size} parameters, float32'


def test_a_workdir_without_a_product_is_refused(tmp_path: pathlib.Path):
  workdir_lib.open_workdir(tmp_path, tiny.config())
  with pytest.raises(
      SourceError, match='in which none of these stages is done: ppo'
  ):
    _find(str(tmp_path))
  with pytest.raises(SourceError, match='is done: reward_model; finish it'):
    _find(str(tmp_path), 'reward_model')


def test_weights_are_in_the_dtype_they_are_computed_with(store: served.Store):
  found = finished.find('model', store.policy, 'bfloat16')
  params = found.load()
  assert params['embedding'].dtype == 'bfloat16'
  assert params['layers']['mlp']['up'].dtype == 'bfloat16'
  assert params['final_norm']['scale'].dtype == 'float32'  # as in training
  assert found.shape.remat == 'none'
  want = draw('policy', served.RANDOM, 3)['embedding'].astype('bfloat16')
  np.testing.assert_array_equal(params['embedding'], want)


def test_kinds_are_told_apart_before_a_weight_is_read(store: served.Store):
  # A policy has no score, a reward model needs one.
  with pytest.raises(SourceError, match='--model=(.|\n)*score.weight.*is not'):
    _find(store.scalar)
  with pytest.raises(SourceError, match='--reward_model=(.|\n)*score.weight'):
    _find(store.policy, 'reward_model')


def test_the_reward_model_must_read_the_same_tokens(store: served.Store):
  policy = _find(store.policy)
  finished.check_pair(policy, None)
  finished.check_pair(policy, _find(store.scalar, 'reward_model'))
  with pytest.raises(SourceError, match='foreign: its tokenizer differs from'):
    finished.check_pair(policy, _find(store.foreign, 'reward_model'))


def test_a_reward_model_without_a_tokenizer_serves(
    store: served.Store, tmp_path: pathlib.Path
):
  folder = shutil.copytree(store.foreign, tmp_path / 'bare')
  (folder / manifest.NAME).unlink()  # changed on purpose
  for file in folder.glob('*token*'):
    file.unlink()
  found = _find(str(folder), 'reward_model')
  assert found.tokenizer is None
  finished.check_pair(_find(store.policy), found)


def test_an_embedding_smaller_than_the_tokenizer_is_refused(
    store: served.Store, tmp_path: pathlib.Path
):
  folder = shutil.copytree(store.policy, tmp_path / 'small')
  (folder / manifest.NAME).unlink()  # changed on purpose
  path = folder / 'tokenizer.json'
  content = json.loads(path.read_text())
  vocab = content['model']['vocab']
  vocab |= {f'word{i}': len(vocab) + i for i in range(40)}
  path.write_text(json.dumps(content))
  with pytest.raises(SourceError, match='has 320 rows, fewer than the 3'):
    finished.check_pair(_find(str(folder)), None)


def test_a_folder_without_a_tokenizer_is_refused(
    store: served.Store, tmp_path: pathlib.Path
):
  folder = shutil.copytree(store.policy, tmp_path / 'bare')
  (folder / manifest.NAME).unlink()  # changed on purpose
  for file in folder.glob('*token*'):
    file.unlink()
  with pytest.raises(SourceError, match='bare holds no tokenizer.json or tok'):
    _find(str(folder))


def test_absent_models_are_refused():
  with pytest.raises(SourceError, match="--model=/none: '/none' is not a fol"):
    _find('/none')


def test_the_mesh_splits_rows_and_on_demand_weights(store: served.Store):
  count = len(jax.local_devices())
  assert dict(finished.make_mesh(1).shape) == {
      'data': count,
      'fsdp': 1,
      'tensor': 1,
  }
  mesh = finished.make_mesh(2)
  assert mesh.shape['data'] == count // 2 and mesh.shape['tensor'] == 2
  with pytest.raises(
      SourceError, match=f'--tensor=3 does not divide the {count}'
  ):
    finished.make_mesh(3)
  policy = _find(store.policy)
  with jax.set_mesh(mesh):
    finished.check_mesh(policy, 2)
  with (
      jax.set_mesh(finished.make_mesh(8)),
      pytest.raises(SourceError, match='--tensor=8 does not split --model='),
  ):
    finished.check_mesh(policy, 8)  # of four heads
