"""Tests of `models.huggingface`."""

from collections.abc import Callable
import dataclasses
import errno
import json
import pathlib
import sys
import tempfile
import types
from typing import Any

from etils import epath
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ma_rlhf_jax.models import heads, huggingface, presets
from tests.models.drawn import (
    TINY,
    UNUSUAL,
    assert_same_bits,
    draw,
    their_tensors,
)


def test_resolve_gives_local_folders(tmp_path: pathlib.Path) -> None:
  assert huggingface.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    'name', ['/no/such', './no', '~/no-such', 'a/b/c', 'x']
)
def test_resolve_names_a_missing_folder(name: str) -> None:
  with pytest.raises(FileNotFoundError, match=f"'{name}' is not a folder"):
    huggingface.resolve(name)


def test_resolve_asks_the_hub_for_no_code_and_no_pickles(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  import huggingface_hub

  def snapshot(name: str, *, allow_patterns: list[str]) -> str:
    assert name == 'user/model'
    assert allow_patterns == ['*.safetensors', '*.json', 'tokenizer.model']
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot)
  assert huggingface.resolve('user/model') == tmp_path


def test_resolve_copies_a_bucket_without_code_and_pickles(
    export: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  bucket = lambda name: epath.Path(name.replace('gs://bucket', str(export)))
  monkeypatch.setattr(huggingface, 'epath', types.SimpleNamespace(Path=bucket))
  for name in ('model.py', 'model.bin'):
    (export / name).write_text('no')
  found = huggingface.resolve('gs://bucket')
  names = {p.name for p in found.iterdir()}
  assert names == {p.name for p in export.iterdir()} - {'model.py', 'model.bin'}
  assert_same_bits(
      draw('policy', UNUSUAL, seed=4),
      huggingface.load_params(found, UNUSUAL, 'policy'),
  )
  with pytest.raises(FileNotFoundError, match="'gs://bucket/x' holds no conf"):
    huggingface.resolve('gs://bucket/x')


def test_a_copy_that_does_not_fit_leaves_nothing(
    export: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
  class Full:
    """A bucket whose second file finds the disk full."""

    def __init__(self, path: pathlib.Path) -> None:
      self.path, self.name = path, path.name

    def __truediv__(self, name: str) -> pathlib.Path:
      return self.path / name

    def glob(self, pattern: str) -> list['Full']:
      return [Full(p) for p in self.path.glob(pattern)]

    def copy(self, target: pathlib.Path) -> None:
      if any(target.parent.iterdir()):
        raise OSError(errno.ENOSPC, 'no space left on device')
      target.write_text('half')

  (tmp_path / 'scratch').mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'scratch'))
  bucket = types.SimpleNamespace(Path=lambda _: Full(export))
  monkeypatch.setattr(huggingface, 'epath', bucket)
  with pytest.raises(OSError, match="no space left to fetch 'gs://full'.*TMPD"):
    huggingface.resolve('gs://full')
  assert not any((tmp_path / 'scratch').iterdir())


def _hub_error(kind: str, status: int) -> Exception:
  from huggingface_hub import errors

  response = types.SimpleNamespace(headers={}, request=None)
  text = f'{status} Error.\nMore lines'
  return getattr(errors, kind)(text, response=response)


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (
            lambda: _hub_error('GatedRepoError', 403),
            'is gated on the hub; accept its terms at '
            'https://huggingface.co/user/model, then set HF_TOKEN',
        ),
        (
            lambda: _hub_error('RepositoryNotFoundError', 401),
            'is neither a folder here nor a repository on the hub; check the '
            'spelling, and set HF_TOKEN if it is a private one',
        ),
        (
            lambda: _hub_error('HfHubHTTPError', 500),
            'could not be fetched from the hub: 500 Error.',
        ),
    ],
)
def test_answers_of_the_hub_are_told_apart(
    error: Callable[[], Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  def snapshot(*_: Any, **__: Any) -> None:
    raise error()

  monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
  with pytest.raises(FileNotFoundError) as caught:
    huggingface.resolve('user/model')
  assert str(caught.value) == f"'user/model' {message}"


def test_a_full_disk_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
  def snapshot(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, 'no space left on device')

  monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
  with pytest.raises(OSError, match="fetch 'user/model'; free.*HF_HOME"):
    huggingface.resolve('user/model')


def test_resolve_offline_names_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  with pytest.raises(
      FileNotFoundError,
      match="'user/no-such-model' is neither .* nor in the cache",
  ):
    huggingface.resolve('user/no-such-model')


def test_what_is_no_id_of_the_hub_is_refused() -> None:
  with pytest.raises(FileNotFoundError, match="'user/a..b' could not be"):
    huggingface.resolve('user/a..b')


def test_read_shape_gives_that_of_the_file(export: pathlib.Path) -> None:
  assert huggingface.read_shape(export) == UNUSUAL
  path = export / 'config.json'
  changed = json.loads(path.read_text()) | {'hidden_act': 'x', 'head_dim': 7}
  path.write_text(json.dumps(changed))
  with pytest.raises(ValueError) as error:
    huggingface.read_shape(export)
  first, *reasons = str(error.value).split('\n  ')
  assert first == f'{path} cannot be used:'
  assert [reason.split()[0] for reason in reasons] == [
      'head_dim=7',
      'hidden_act',
  ]


def test_code_beside_a_model_is_never_run(export: pathlib.Path) -> None:
  (export / 'modeling.py').write_text('raise SystemExit(3)')
  path = export / 'config.json'
  code = {'auto_map': {'AutoModelForCausalLM': 'modeling.Model'}}
  path.write_text(json.dumps(json.loads(path.read_text()) | code))
  assert huggingface.read_shape(export) == UNUSUAL  # a Gemma all the same
  huggingface.check_params(export, UNUSUAL, 'policy')
  assert 'modeling' not in sys.modules


def test_missing_config_is_named(tmp_path: pathlib.Path) -> None:
  with pytest.raises(FileNotFoundError, match='config.json is missing'):
    huggingface.read_shape(tmp_path)


def test_an_adapter_is_no_model(tmp_path: pathlib.Path) -> None:
  base = {'base_model_name_or_path': 'google/gemma-2b', 'peft_type': 'LORA'}
  (tmp_path / 'adapter_config.json').write_text(json.dumps(base))
  with pytest.raises(
      ValueError,
      match=r'is a LoRA adapter, .* its base model \(google/gemma-2b\)',
  ):
    huggingface.read_shape(tmp_path)


@pytest.mark.parametrize('prefix', ['model.', 'rwtransformer.'])
def test_reward_model_in_the_authors_names(
    prefix: str, tmp_path: pathlib.Path
) -> None:
  params = draw('scalar', TINY, seed=8)
  names = {'prefix': prefix, 'head': 'v_head.weight'}
  tensors = their_tensors('scalar', TINY, params, **names)
  assert prefix + 'layers.0.mlp.up_proj.weight' in tensors
  save_file(tensors, tmp_path / 'model.safetensors')
  assert_same_bits(params, huggingface.load_params(tmp_path, TINY, 'scalar'))


def test_matrices_and_norms_may_differ_in_type(export: pathlib.Path) -> None:
  mixed = dataclasses.replace(UNUSUAL, kernel_dtype='bfloat16')
  found = huggingface.load_params(export, mixed, 'policy')
  like = heads.abstract_params('policy', mixed)
  assert {str(x.dtype) for x in jax.tree.leaves(like)} == {
      'bfloat16',
      'float32',
  }
  whole = draw('policy', UNUSUAL, seed=4)
  rounded = jax.tree.map(
      lambda x, y: np.asarray(x).astype(y.dtype), whole, like
  )
  assert_same_bits(rounded, found)


def test_adapters_are_not_read(export: pathlib.Path) -> None:
  config = dataclasses.replace(UNUSUAL, lora=presets.Lora(2, 4.0, ('query',)))
  with pytest.raises(ValueError, match='is read without adapters'):
    huggingface.load_params(export, config, 'policy')


def test_a_policy_is_no_scalar_model(export: pathlib.Path) -> None:
  with pytest.raises(ValueError, match='score.weight is missing') as error:
    huggingface.load_params(export, UNUSUAL, 'scalar')
  assert 'does not fit a reward model or critic (Seq' in str(error.value)
