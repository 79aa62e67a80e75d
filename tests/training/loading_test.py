"""What is loaded of a model that exists, and which are refused."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.models import exporting, heads, lora
from ma_rlhf_jax.training import loading, model_configs, sources
from ma_rlhf_jax.training.products import Source, SourceError
from tests import tiny
from tests.hashing import params_sha256
from tests.models.drawn import draw
from tests.training.stores import (
    MODEL,
    SHAPE,
    Store,
    sha256,
    store_config,
    store_run,
)


@pytest.mark.parametrize(
    'field', ['sft.init', 'ppo.policy_init', 'ppo.from', 'ppo.reward_model']
)
def test_a_workdir_whose_stage_is_not_done_is_refused(
    store: Store, tmp_path: pathlib.Path, field: str
) -> None:
  workdir_lib.open_workdir(tmp_path / 'new', tiny.config())
  name = field.replace('from', 'from_run').replace('.', '__')
  run = tiny.run(
      tmp_path,
      tiny.config(**{**MODEL, name: str(tmp_path / 'new')}),
      tokenizer=store.tokenizer,
  )
  with pytest.raises(SourceError) as caught:
    sources.given_stages(run.config, tmp_path)
    loading.initial_policy(run)
  message = str(caught.value)
  assert message.startswith(f'{field}={tmp_path}/new is a workdir in which')
  assert 'is done' in message and 'finish it' in message


def test_sft_starts_from_a_folder_or_another_run(
    store: Store, tmp_path: pathlib.Path
) -> None:
  shape, params = loading.initial_policy(
      store_run(store, tmp_path, sft__init='policy')
  )
  want = model_configs.trained_whole(SHAPE, tiny.config().model)
  assert shape == want
  assert params_sha256(params) == sha256('policy', 3)
  _, of_run = loading.initial_policy(
      store_run(store, tmp_path, sft__init='workdir')
  )
  assert params_sha256(of_run) == sha256('policy', 1)


def test_random_weights_have_the_rows_of_the_tokenizer_and_a_seed(
    store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(
      heads, 'init_params', lambda kind, shape, key: (kind, shape, key)
  )
  run = store_run(store, tmp_path)
  shape, (kind, same, key) = loading.initial_policy(run)
  want = model_configs.trained_whole(SHAPE, run.config.model)
  assert shape == same == want and kind == 'policy'
  run.config.model.vocab_size = 0
  run.config.seed = 1
  shape, (_, _, other) = loading.initial_policy(run)
  assert shape.vocab_size == len(store.tokenizer) < 310
  data = [jax.random.key_data(k).tolist() for k in (key, other)]
  assert data[0] != data[1]


@pytest.mark.parametrize(
    'fields, seed',
    [
        ({'reward_model__init': 'policy'}, 3),
        ({'reward_model__init': 'workdir'}, 1),
        ({'ppo__policy_init': 'policy'}, 3),
    ],
)
def test_a_reward_model_starts_from_a_policy_with_a_new_head(
    store: Store, tmp_path: pathlib.Path, fields: dict[str, str], seed: int
) -> None:
  run = store_run(store, tmp_path, **fields)
  _, params = loading.initial_reward_model(run)
  assert params_sha256(params['backbone']) == sha256('policy', seed)
  assert params['head'].shape == (16,)
  assert 0.05 < float(np.std(params['head'])) < 0.6  # about 1 / sqrt(17)


def test_a_model_is_read_in_the_dtype_of_the_run(
    store: Store, tmp_path: pathlib.Path
) -> None:
  run = store_run(store, tmp_path)
  run.config.model.dtype = 'bfloat16'
  source = Source('ppo.reward_model', store.scalar)
  # What does not learn is held as it is computed with, but for norms and head.
  shape, params = loading.load(run, source, 'scalar')
  assert (shape.param_dtype, shape.kernel_dtype) == ('float32', 'bfloat16')
  for path, x in lora.flatten(params).items():
    small = path == 'head' or path.endswith('scale')
    assert x.dtype == ('float32' if small else 'bfloat16'), path
  # What learns keeps its bits.
  _, params = loading.load_to_train(run, source, 'scalar', 'critic')
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'float32'}


@pytest.mark.slow
def test_adapters_share_the_weights_of_the_model_they_start_from(
    store: Store, tmp_path: pathlib.Path
) -> None:
  run = store_run(store, tmp_path)
  run.config.lora.rank = 2
  source = Source('ppo.reward_model', store.scalar)
  frozen = loading.load(run, source, 'scalar')
  shape, params = loading.load_to_train(run, source, 'scalar', 'critic', frozen)
  assert shape.lora.rank == 2
  base, learning = map(lora.flatten, lora.split(shape, params))
  before = lora.flatten(frozen[1])
  assert all(x is before[path] for path, x in base.items())
  assert learning['head'] is not before['head']
  policy = loading.load_to_train(
      run, Source('sft.init', store.policy), 'policy', 'sft'
  )
  ours = lora.flatten(policy[1])['layers/mlp/up_lora_a']
  theirs = learning['backbone/layers/mlp/up_lora_a']
  assert not np.array_equal(ours, theirs)  # each with keys of its own
  # Random weights are no base to keep: all of them learn.
  assert loading.initial_policy(run)[0].lora is None


def test_another_tokenizer_is_refused(
    store: Store, tmp_path: pathlib.Path
) -> None:
  run = store_run(store, tmp_path)
  with pytest.raises(SourceError) as caught:
    loading.load(run, Source('ppo.policy_init', store.foreign), 'policy')
  message = str(caught.value)
  assert message.startswith('ppo.policy_init: the tokenizer in')
  assert store.foreign in message and 'tokenizer.path' in message


def test_an_embedding_too_small_for_the_tokenizer_is_refused(
    store: Store, tmp_path: pathlib.Path
) -> None:
  folder = tmp_path / 'bare'
  params = draw('policy', SHAPE, 0)
  exporting.save(folder, params, SHAPE, 'policy', store.tokenizer)
  for name in ('tokenizer_config.json', manifest.NAME):
    (folder / name).unlink()
  run = tiny.run(tmp_path, store_config(store), tokenizer=store.larger)
  with pytest.raises(SourceError) as caught:
    loading.load(run, Source('ppo.policy_init', str(folder)), 'policy')
  need = f'310 rows, fewer than the {len(store.larger)} entries'
  assert need in str(caught.value)


def test_rows_without_an_entry_of_the_tokenizer_are_noted_once(
    store: Store, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
  run = store_run(
      store, tmp_path, sft__init='policy', ppo__reward_model='scalar'
  )
  loading._note.cache_clear()  # other tests inspect these models too
  loading.check(run)
  loading.initial_policy(run)
  lines = capsys.readouterr().out.splitlines()
  rows = f'has 310 rows for the {len(store.tokenizer)} entries of the tokenizer'
  assert len(store.tokenizer) < 310
  assert [line.partition(':')[0] for line in lines] == ['note'] * 2
  assert f'sft.init {store.policy}: the embedding {rows}' in lines[0]
  assert f'ppo.reward_model {store.scalar}: the embedding {rows}' in lines[1]
  same = dataclasses.replace(run, tokenizer=range(310))
  source = Source('sft.init', store.policy)
  loading._check_fit(same, source, SHAPE, 'policy')
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'ppo__reward_model': 'policy'}, 'score.weight is missing'),
        ({'ppo__policy_init': 'foreign'}, 'differs from the one of this run'),
    ],
)
def test_what_cannot_be_loaded_later_is_refused_at_the_start(
    store: Store, tmp_path: pathlib.Path, fields: dict, message: str
) -> None:
  (field,) = fields
  with pytest.raises(SourceError, match=message) as error:
    loading.check(store_run(store, tmp_path, **fields))
  assert field.replace('__', '.') in str(error.value)


def test_a_new_model_must_hold_the_tokenizer_and_suit_the_mesh(
    store: Store, tmp_path: pathlib.Path
) -> None:
  loading.check(store_run(store, tmp_path))
  config = store_config(store)
  config.model.vocab_size = 10
  run = tiny.run(tmp_path, config, tokenizer=store.tokenizer)
  with pytest.raises(SourceError, match='the embedding has 10 rows'):
    loading.check(run)
  uneven = store_run(store, tmp_path)
  uneven = dataclasses.replace(uneven, mesh=tiny.mesh(1, 1, 8))
  with pytest.raises(SourceError, match="'tensor': 8} does not split evenly"):
    loading.check(uneven)


def test_a_run_of_another_shape_is_not_reused(
    store: Store, tmp_path: pathlib.Path
) -> None:
  run = store_run(store, tmp_path, ppo__from_run='workdir')
  source = sources.source(run.config, tmp_path, 'ppo')
  _, params = loading.load(run, source, 'policy')
  assert params_sha256(params) == sha256('policy', 1)
  run.config.model.mlp_dim = 40
  run.config.model.rope_theta = 500.0
  with pytest.raises(SourceError) as caught:
    loading.load(run, source, 'policy')
  message = str(caught.value)
  assert message.startswith(f'ppo.from={store.workdir} has a model of another')
  assert 'mlp_dim: 22 there, 40 here' in message
  assert 'rope_theta: 10000.0 there, 500.0 here' in message
  assert 'head_dim' not in message
