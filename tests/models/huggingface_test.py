"""Tests of `models.huggingface`."""

import dataclasses
import json
import pathlib
import types
from typing import Any

from etils import epath
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ma_rlhf_jax.models import huggingface, tensor_names
from tests.models.drawn import TINY, UNUSUAL, assert_same_bits, draw


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


def test_resolve_offline_names_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  with pytest.raises(
      FileNotFoundError, match="'user/no-such-model' is neither"
  ):
    huggingface.resolve('user/no-such-model')


_CONFIG_JSON = {
    'model_type': 'gemma',
    'vocab_size': 320,
    'num_hidden_layers': 3,
    'hidden_size': 24,
    'intermediate_size': 36,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 10,
}


def _with(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps({**_CONFIG_JSON, **changes}))
  return folder


@pytest.mark.parametrize(
    ('changes', 'theta', 'eps'),
    [
        ({}, 10_000.0, 1e-6),  # what a file that says nothing means
        ({'rope_theta': 500.0, 'rope_scaling': None}, 500.0, 1e-6),
        (
            {'rope_parameters': {'rope_type': 'default', 'rope_theta': 70.0}},
            70.0,
            1e-6,
        ),
        (
            {
                'hidden_act': 'gelu',
                'hidden_activation': None,
                'rms_norm_eps': 1,
            },
            10_000.0,
            1,
        ),
        ({'hidden_activation': 'gelu_pytorch_tanh'}, 10_000.0, 1e-6),
    ],
)
def test_read_shape(
    changes: dict, theta: float, eps: float, tmp_path: pathlib.Path
) -> None:
  assert huggingface.read_shape(_with(tmp_path, **changes)) == (
      dataclasses.replace(UNUSUAL, rope_theta=theta, norm_eps=eps)
  )


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'model_type': 'gemma3'}, "model_type is 'gemma3'; implemented"),
        ({'hidden_act': 'relu'}, "hidden_act is 'relu'"),
        ({'hidden_activation': 'silu'}, "hidden_activation is 'silu'"),
        ({'attention_bias': True}, 'attention_bias is True'),
        ({'tie_word_embeddings': False}, 'tie_word_embeddings is False'),
        ({'use_bidirectional_attention': True}, 'use_bidirectional_attention'),
        ({'rope_scaling': {'type': 'linear', 'factor': 2}}, "type 'linear'"),
        ({'rope_parameters': {'rope_type': 'yarn'}}, "type 'yarn'"),
        ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary'),
        ({'num_key_value_heads': 3}, 'num_key_value_heads=3 does not divide'),
        ({'head_dim': 7}, 'head_dim=7 is odd'),
        ({'hidden_size': None}, 'hidden_size is None'),
    ],
)
def test_what_is_not_implemented_is_refused(
    changes: dict, reason: str, tmp_path: pathlib.Path
) -> None:
  with pytest.raises(ValueError, match=reason) as error:
    huggingface.read_shape(_with(tmp_path, **changes))
  assert str(tmp_path / 'config.json') in str(error.value)


def test_all_reasons_are_given_at_once(tmp_path: pathlib.Path) -> None:
  folder = _with(tmp_path, hidden_act='relu', attention_bias=True, head_dim=0)
  with pytest.raises(ValueError, match=r'(?s)head_dim.*relu.*attention_bias'):
    huggingface.read_shape(folder)


def test_missing_config_is_named(tmp_path: pathlib.Path) -> None:
  with pytest.raises(FileNotFoundError, match='config.json is missing'):
    huggingface.read_shape(tmp_path)


@pytest.mark.parametrize('prefix', ['model.', 'rwtransformer.'])
def test_reward_model_in_the_authors_names(
    prefix: str, tmp_path: pathlib.Path
) -> None:
  params = draw('scalar', TINY, seed=8)
  names = {'prefix': prefix, 'head': 'v_head.weight'}
  tensors = {}
  for t in tensor_names.list_tensors('scalar', TINY, **names):
    leaf = params
    for part in t.path.split('/'):
      leaf = leaf[part]
    leaf = np.asarray(leaf if t.layer is None else leaf[t.layer])
    tensors[t.name] = np.ascontiguousarray(
        tensor_names.to_theirs(leaf, t.inputs)
    )
  assert prefix + 'layers.0.mlp.up_proj.weight' in tensors
  save_file(tensors, tmp_path / 'model.safetensors')
  assert_same_bits(params, huggingface.load_params(tmp_path, TINY, 'scalar'))


def test_every_mismatch_is_listed(export: pathlib.Path) -> None:
  tensors = load_file(export / 'model.safetensors')
  del tensors['model.norm.weight']
  tensors['model.layers.1.mlp.up_proj.weight'] = np.zeros((24, 36), np.float32)
  tensors['model.layers.0.mlp.up_proj.weight'] = np.zeros((36, 24), np.int8)
  tensors['model.layers.3.mlp.up_proj.weight'] = np.zeros((36, 24), np.float32)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  save_file(tensors, export / 'model.safetensors')
  with pytest.raises(ValueError, match='does not fit a policy') as error:
    huggingface.load_params(export, UNUSUAL, 'policy')
  assert sorted(str(error.value).split('\n  ')[1:]) == [
      'model.layers.0.mlp.up_proj.weight is of type I8; needs one of '
      "('F64', 'F32', 'F16', 'BF16')",
      'model.layers.1.mlp.up_proj.weight has shape [24, 36]; needs [36, 24]',
      'model.layers.3.mlp.up_proj.weight is not part of this model',
      'model.norm.weight is missing; needs shape [24]',
  ]


def test_a_policy_is_no_scalar_model(export: pathlib.Path) -> None:
  with pytest.raises(ValueError, match='score.weight is missing'):
    huggingface.load_params(export, UNUSUAL, 'scalar')


def test_broken_and_foreign_files_are_named(export: pathlib.Path) -> None:
  file = export / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-10])
  with pytest.raises(ValueError, match='model.safetensors .* not a whole'):
    huggingface.load_params(export, UNUSUAL, 'policy')
  file.write_text('version https://git-lfs.github.com/spec/v1')
  with pytest.raises(ValueError, match=r'\(42 bytes\) is not a whole'):
    huggingface.load_params(export, UNUSUAL, 'policy')


def test_pickles_are_refused_with_the_reason(export: pathlib.Path) -> None:
  (export / 'model.safetensors').rename(export / 'pytorch_model.bin')
  with pytest.raises(FileNotFoundError, match='pytorch_model.bin.*runs the'):
    huggingface.load_params(export, UNUSUAL, 'policy')


def test_index_stays_inside_the_folder(export: pathlib.Path) -> None:
  (export / 'model.safetensors').rename(export / 'a.safetensors')
  names = {'x': '../b.safetensors', 'y': 'a.safetensors', 'z': 'c.safetensors'}
  index = export / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': names}))
  with pytest.raises(ValueError, match=r"\['../b.*missing: \['c.safe"):
    huggingface.load_params(export, UNUSUAL, 'policy')
