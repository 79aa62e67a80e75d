"""Exports are what was trained, and say so only where it is true."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
from typing import Any

import jax
import pytest

from ma_rlhf_jax.models import export_check, exporting, huggingface
from ma_rlhf_jax.models.export_check import ExportCheckError
from ma_rlhf_jax.models.presets import Lora
from ma_rlhf_jax.publishing import check_rows, publish
from ma_rlhf_jax.training import products as products_lib
from ma_rlhf_jax.training import sources
from tests import products
from tests.models.drawn import assert_same_bits

_WHOLE = {'dtype': '', 'max_shard_bytes': 10**9}
_HAS_TORCH = importlib.util.find_spec('torch') is not None
_HAS_PEFT = importlib.util.find_spec('peft') is not None


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> products.Made:
  return products.make(tmp_path_factory.mktemp('whole'))


@pytest.fixture(scope='module')
def adapted(tmp_path_factory: pytest.TempPathFactory) -> products.Made:
  adapters = Lora(2, 3.0, ('query', 'down'))
  root = tmp_path_factory.mktemp('adapted')
  return products.make(root, products.GEMMA2, adapters)


def _job(made: products.Made, stage: str, folder: pathlib.Path) -> publish.Job:
  kind = 'policy' if stage in ('sft', 'ppo') else 'scalar'
  rows = check_rows.held_out(made.config, made.tokenizer, kind)
  folder.mkdir(exist_ok=True)
  return publish.Job(
      made.config, made.workdir, stage, made.tokenizer, rows, 'me/it', folder
  )


def _without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
  find = importlib.util.find_spec
  monkeypatch.setattr(
      importlib.util,
      'find_spec',
      lambda name: None if name in packages else find(name),
  )


def test_an_export_is_what_was_trained(
    whole: products.Made, tmp_path: pathlib.Path
) -> None:
  receipt = publish.write_model(_job(whole, 'ppo', tmp_path), **_WHOLE)
  found = huggingface.load_params(tmp_path, products.SHAPE)
  assert_same_bits(whole.params['ppo'], found)
  ours, theirs = receipt['readers'].values()
  assert ours['max_logit_difference'] == 0 and ours['top1_agreement'] == 1
  assert receipt['rounding_to_dtype']['max_logit_difference'] == 0
  assert receipt['sums_in']['transformers'] == (
      'float32' if _HAS_TORCH else None
  )
  if _HAS_TORCH:
    assert 0 < theirs['max_logit_difference'] < 1e-4
    assert theirs['top1_agreement'] == 1
    named = receipt['reader_versions']['transformers']
    assert named['transformers'] == importlib.metadata.version('transformers')
  # Eight prompts of a dozen words, not one token.
  assert receipt['rows'] == 8 and receipt['tokens'] > 80
  assert receipt['compared'] == receipt['tokens']
  assert receipt['dtype'] == 'float32' and receipt['stage'] == 'ppo'
  written = json.loads((tmp_path / 'export_check.json').read_text())
  assert written == receipt
  names = {p.name for p in tmp_path.iterdir()}
  assert names - set(receipt['sha256']) == {'export_check.json'}
  assert receipt['sha256'] == {
      name: digest
      for name, digest in export_check.sha256_of_files(tmp_path).items()
      if name != 'export_check.json'
  }
  assert '| ma\\_rlhf\\_jax | 0 |' in (tmp_path / 'README.md').read_text()
  assert 'NOTICE' not in names  # random weights are no Gemma


@pytest.mark.slow
def test_rounding_is_told_apart_from_what_is_read_back(
    whole: products.Made, tmp_path: pathlib.Path
) -> None:
  job = _job(whole, 'reward_model', tmp_path)
  receipt = publish.write_model(job, dtype='bfloat16', max_shard_bytes=4000)
  assert receipt['dtype'] == 'bfloat16'
  assert receipt['readers']['ma_rlhf_jax']['max_score_difference'] == 0
  assert receipt['rounding_to_dtype']['max_score_difference'] > 1e-4
  assert 'top1_agreement' not in receipt['rounding_to_dtype']
  shape = dataclasses.replace(products.SHAPE, param_dtype='bfloat16')
  found = huggingface.load_params(tmp_path, shape, 'scalar')
  rounded = jax.tree.map(
      lambda x: x.astype('bfloat16'), whole.params['reward_model']
  )
  assert_same_bits(rounded, found)
  shards = [n for n in receipt['sha256'] if n.endswith('.safetensors')]
  assert len(shards) > 2 and 'model.safetensors.index.json' in receipt['sha256']


@pytest.mark.slow
def test_a_model_with_adapters_is_written_whole_in_one_dtype(
    tmp_path: pathlib.Path,
) -> None:
  # Frozen matrices are bfloat16, norms and adapters float32.
  shape = dataclasses.replace(
      products.SHAPE, dtype='bfloat16', kernel_dtype='bfloat16'
  )
  adapters = Lora(2, 3.0, ('up',))
  made = products.make(tmp_path, shape, adapters, model__dtype='bfloat16')
  stored = huggingface.resolve(products_lib.product(made.workdir, 'sft'))
  assert json.loads((stored / 'config.json').read_text())['dtype'] == 'bfloat16'
  receipt = publish.write_model(_job(made, 'sft', tmp_path / 'out'), **_WHOLE)
  assert receipt['dtype'] == 'bfloat16'
  assert receipt['readers']['ma_rlhf_jax']['max_logit_difference'] == 0
  from safetensors import safe_open

  with safe_open(tmp_path / 'out' / 'model.safetensors', 'numpy') as file:
    dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}
  assert dtypes == {'BF16'}


def test_without_pytorch_our_loader_alone_checks(
    whole: products.Made,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  _without(monkeypatch, 'torch')
  monkeypatch.setattr(publish.lineage, 'is_gemma', lambda *_: True)
  receipt = publish.write_model(_job(whole, 'critic', tmp_path), **_WHOLE)
  # What the terms of Gemma ask for, who derives from it.
  assert 'NOTICE' in receipt['sha256']
  assert 'ai.google.dev/gemma/terms' in (tmp_path / 'NOTICE').read_text()
  assert 'license: gemma\n' in (tmp_path / 'README.md').read_text()
  assert receipt['readers']['transformers'] is None
  assert receipt['sums_in']['transformers'] is None
  assert receipt['reader_versions']['transformers'] is None
  assert receipt['readers']['ma_rlhf_jax']['max_score_difference'] == 0
  assert 'transformers |' not in (tmp_path / 'README.md').read_text()


def test_files_that_differ_from_their_source_are_refused(
    whole: products.Made,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  _without(monkeypatch, 'torch')
  save = exporting.save

  def spoilt(folder: Any, params: Any, *rest: Any, **more: Any) -> None:
    params['layers']['mlp']['up'] *= 1.001
    save(folder, params, *rest, **more)

  monkeypatch.setattr(exporting, 'save', spoilt)
  job = _job(whole, 'ppo', tmp_path)
  with pytest.raises(ExportCheckError, match='ma_rlhf_jax reads back differs'):
    # What the model says is asked for after it was written, so it is the
    # spoilt one; the copy in bfloat16 comes from the product.
    publish.write_model(job, dtype='bfloat16', max_shard_bytes=10**9)
  assert not (tmp_path / 'export_check.json').exists()


@pytest.mark.parametrize(
    'stage',
    # PPO's policy is written as that of SFT is.
    [
        'sft',
        pytest.param('reward_model', marks=pytest.mark.slow),
        pytest.param('ppo', marks=pytest.mark.slow),
        pytest.param('critic', marks=pytest.mark.slow),
    ],
)
def test_base_and_adapters_are_the_merged_model(
    stage: str, adapted: products.Made, tmp_path: pathlib.Path
) -> None:
  receipt = publish.write_adapter(_job(adapted, stage, tmp_path))
  assert receipt['readers'].keys() == {'ma_rlhf_jax', 'peft'}
  for name, found in receipt['readers'].items():
    if name == 'peft' and not _HAS_PEFT:
      assert found is None
      continue
    largest = next(iter(found.values()))
    assert 0 <= largest < 1e-4, name
  assert {p.name for p in tmp_path.iterdir()} == {
      'README.md',
      'adapter_config.json',
      'adapter_model.safetensors',
      'export_check.json',
      'ma_rlhf_manifest.json',
      'tokenizer.json',
      'tokenizer_config.json',
  }
  readme = (tmp_path / 'README.md').read_text()
  base = sources.base(adapted.config, adapted.workdir, stage)
  assert 'base_path = "PATH_OF_THE_BASE"' in readme and base not in readme


def test_adapters_of_another_base_are_refused(
    adapted: products.Made,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  _without(monkeypatch, 'peft')
  other = products_lib.product(adapted.workdir, 'ppo')
  monkeypatch.setattr(publish.peft_folder, 'read_base', lambda _: other)
  with pytest.raises(ExportCheckError, match='differs from its source'):
    publish.write_adapter(_job(adapted, 'sft', tmp_path))


def test_all_devices_share_a_model_that_they_can_split(
    whole: products.Made, tmp_path: pathlib.Path
) -> None:
  job = _job(whole, 'sft', tmp_path)
  even = dataclasses.replace(products.SHAPE, embed_dim=16)
  assert len(job.rows) == len(jax.devices()) == 8
  with publish._mesh(job, even):
    assert dict(jax.sharding.get_mesh().shape)['fsdp'] == 8
  with publish._mesh(job, products.SHAPE):
    assert jax.sharding.get_mesh().size == 1
  few = dataclasses.replace(job, rows=job.rows[:3])
  with publish._mesh(few, even):
    assert jax.sharding.get_mesh().size == 1
