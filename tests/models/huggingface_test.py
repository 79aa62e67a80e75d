"""Tests of `models.huggingface`; parity needs PyTorch and transformers."""

from collections.abc import Callable, Iterator
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ma_rlhf_jax import masking
from ma_rlhf_jax.data.tokenizer import load_tokenizer, train_tokenizer
from ma_rlhf_jax.models import (
    exporting,
    gemma,
    heads,
    huggingface,
    tensor_names,
)
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.mesh import make_mesh
from ma_rlhf_jax.structs import Array, Params
from tests.models.drawn import TINY, draw, left_padded

# As TINY, with room for a tokenizer and constants that differ from Gemma's.
CONFIG = dataclasses.replace(
    TINY, vocab_size=320, rope_theta=500.0, norm_eps=1e-3
)
KV_HEADS = (1, 2)
_TEXTS = ['the cat sat on the mat', 'a dog ran after the cat, then slept'] * 9
_states = jax.jit(gemma.hidden_states, static_argnums=0)
_scores = jax.jit(heads.token_scores, static_argnums=0)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
  folder = str(tmp_path_factory.mktemp('tokenizer'))
  train_tokenizer(_TEXTS, 300, folder)
  return load_tokenizer(folder)


def _equal(ours: Params, theirs: Params) -> None:
  """Bit for bit, dtype included."""
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(
        np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
    )


# Layouts and names.


def test_layouts_by_hand() -> None:
  # [D, N, H] = [2, 1, 3] -> [N * H, D], and [N, H, D] = [1, 3, 2] -> [D, N * H]
  x = np.array([[[1, 2, 3]], [[4, 5, 6]]])
  theirs = tensor_names.to_theirs(x, 1)
  np.testing.assert_array_equal(theirs, [[1, 4], [2, 5], [3, 6]])
  np.testing.assert_array_equal(tensor_names.to_ours(theirs, 1, x.shape), x)
  x = np.array([[[1, 2], [3, 4], [5, 6]]])
  theirs = tensor_names.to_theirs(x, 2)
  np.testing.assert_array_equal(theirs, [[1, 3, 5], [2, 4, 6]])
  np.testing.assert_array_equal(tensor_names.to_ours(theirs, 2, x.shape), x)
  np.testing.assert_array_equal(tensor_names.to_theirs(x, 0), x)


def test_every_parameter_has_a_tensor() -> None:
  for kind in heads.MODELS:
    tensors = tensor_names.list_tensors(kind, TINY)
    assert len({t.name for t in tensors}) == len(tensors)
    count = sum(int(np.prod(t.shape)) for t in tensors)
    assert count == TINY.num_params + (24 if kind == 'scalar' else 0)
  shapes = {t.name: t.shape for t in tensors}
  assert shapes['model.layers.2.self_attn.q_proj.weight'] == (40, 24)
  assert shapes['model.layers.2.self_attn.k_proj.weight'] == (20, 24)
  assert shapes['model.layers.2.self_attn.o_proj.weight'] == (24, 40)
  assert shapes['model.layers.2.mlp.down_proj.weight'] == (24, 36)
  assert shapes['score.weight'] == (1, 24)


# Round trips.


@pytest.mark.parametrize('kind', ['policy', 'scalar'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shard_bytes', [10**9, 20_000])
def test_round_trip_is_bit_identical(
    kind: str,
    dtype: str,
    shard_bytes: int,
    tokenizer: Any,
    tmp_path: pathlib.Path,
) -> None:
  config = dataclasses.replace(CONFIG, param_dtype=dtype)
  params, folder = draw(kind, config, seed=4), tmp_path / 'hf'
  exporting.save(
      folder, params, config, kind, tokenizer, max_shard_bytes=shard_bytes
  )
  found = huggingface.load_params(folder, config, kind)
  _equal(params, found)
  shape = dataclasses.replace(CONFIG, param_dtype='float32')
  assert huggingface.read_shape(folder) == shape
  shards = sorted(p.name for p in folder.glob('*.safetensors'))
  if shard_bytes > 10**6:
    assert shards == ['model.safetensors']
    return
  assert len(shards) > 2
  last = f'model-{len(shards):05}-of-{len(shards):05}.safetensors'
  assert shards[-1] == last
  sizes = [
      sum(x.nbytes for x in load_file(folder / s).values()) for s in shards
  ]
  embedding = 320 * 24 * jnp.dtype(dtype).itemsize
  assert max(sizes) <= max(shard_bytes, embedding)
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == sum(sizes)
  assert set(index['weight_map'].values()) == set(shards)


def test_dtype_of_the_file_and_of_the_parameters_may_differ(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  params, folder = draw('policy', CONFIG, seed=4), tmp_path / 'hf'
  exporting.save(
      folder, params, CONFIG, 'policy', tokenizer, dtype='bfloat16'
  )
  assert json.loads((folder / 'config.json').read_text())['dtype'] == 'bfloat16'
  rounded = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params
  )
  _equal(rounded, huggingface.load_params(folder, CONFIG, 'policy'))


def test_parameters_come_from_and_go_onto_a_mesh(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  params = draw('scalar', CONFIG, seed=4)
  mesh = make_mesh(ConfigDict({'data': 2, 'fsdp': 2, 'tensor': 2}))
  with jax.set_mesh(mesh):
    like = heads.abstract_params('scalar', CONFIG)
    spread = jax.device_put(params, jax.tree.map(lambda x: x.sharding, like))
    exporting.save(tmp_path / 'hf', spread, CONFIG, 'scalar', tokenizer)
    found = huggingface.load_params(tmp_path / 'hf', CONFIG, 'scalar')
  _equal(params, found)
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True)
  assert all(x.sharding == y.sharding for x, y in pairs)
  embedding = found['backbone']['embedding'].addressable_shards[0]
  assert embedding.data.shape == (160, 12)


# Parity with transformers.


class Fault:
  """What a parity test must notice; each breaks our side in one way."""

  @staticmethod
  def none(params: Params, mask: np.ndarray) -> dict[str, Any]:
    return {}

  @staticmethod
  def rotated_positions(params: Params, mask: np.ndarray) -> dict[str, Any]:
    # A shift of all positions changes nothing, so they are turned around.
    return {'positions': np.asarray(masking.positions(mask))[:, ::-1]}

  @staticmethod
  def shifted_mask(params: Params, mask: np.ndarray) -> dict[str, Any]:
    return {'attend': np.roll(masking.causal_mask(mask), 1, axis=2)}

  @staticmethod
  def padding_seen(params: Params, mask: np.ndarray) -> dict[str, Any]:
    return {'attend': masking.causal_mask(np.ones_like(mask))}

  @staticmethod
  def norm_without_one(params: Params, mask: np.ndarray) -> dict[str, Any]:
    fewer = lambda path, x: x - 1 if 'scale' in str(path) else x
    return {'params': jax.tree_util.tree_map_with_path(fewer, params)}


_apply = jax.jit(
    lambda config, params, tokens, positions, attend: gemma.head_logits(
        gemma.Gemma(config).apply(
            {'params': params}, tokens, positions, attend
        )[0],
        params['embedding'],
    ),
    static_argnums=0,
)


def _our_logits(
    config: GemmaConfig,
    params: Params,
    tokens: np.ndarray,
    mask: np.ndarray,
    fault: Callable = Fault.none,
) -> Array:
  inputs = {
      'params': params,
      'positions': masking.positions(mask),
      'attend': masking.causal_mask(mask),
      **fault(params, mask),
  }
  return _apply(
      config, inputs['params'], tokens, inputs['positions'], inputs['attend']
  )


@pytest.fixture(scope='module', params=KV_HEADS)
def pair(
    request: pytest.FixtureRequest,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[GemmaConfig, Params, Any, pathlib.Path]]:
  """Shape, parameters, the model transformers reads from them, its folder."""
  pytest.importorskip('torch')
  import transformers

  config = dataclasses.replace(CONFIG, num_kv_heads=request.param)
  params = draw('policy', config, seed=0)  # its greedy text is diverse
  folder = tmp_path_factory.mktemp('pair') / 'hf'
  exporting.save(folder, params, config, 'policy', tokenizer)
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder, output_loading_info=True, attn_implementation='eager'
  )
  assert not any(report.values()), report
  yield config, params, theirs.eval(), folder


def _difference(pair: tuple, fault: Callable) -> float:
  import torch

  config, params, theirs, _ = pair
  tokens, mask = left_padded([12, 5, 9, 1], 12, seed=7)
  with torch.no_grad():
    want = theirs(
        torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(mask).long(),
    ).logits.numpy()
  ours = _our_logits(config, params, tokens, mask, fault)
  return float(np.abs(np.asarray(ours) - want)[mask].max())


def test_logits_equal_those_of_transformers(pair: tuple) -> None:
  assert _difference(pair, Fault.none) < 1e-4


@pytest.mark.parametrize(
    'fault',
    [
        Fault.rotated_positions,
        Fault.shifted_mask,
        Fault.padding_seen,
        Fault.norm_without_one,
    ],
)
def test_parity_would_notice(fault: Callable, pair: tuple) -> None:
  assert _difference(pair, fault) > 1e-2


def test_greedy_text_is_diverse_and_the_same(pair: tuple) -> None:
  import torch

  config, params, theirs, _ = pair
  start = np.array([[2, 30, 40, 50]])
  with torch.no_grad():
    text = theirs.generate(
        torch.from_numpy(start),
        attention_mask=torch.ones((1, 4), dtype=torch.long),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
    ).numpy()
  assert text.shape == (1, 68)
  assert len(set(text[0, 4:].tolist())) >= 20
  logits = np.array(_our_logits(config, params, text, np.ones_like(text, bool)))
  logits[..., 1] = -np.inf  # no eos within the minimum
  np.testing.assert_array_equal(logits[0, 3:-1].argmax(-1), text[0, 4:])


def test_folder_written_by_transformers_loads(
    pair: tuple, tmp_path: pathlib.Path
) -> None:
  config, params, theirs, _ = pair
  theirs.save_pretrained(tmp_path, max_shard_size='20KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  assert huggingface.read_shape(tmp_path) == config
  _equal(params, huggingface.load_params(tmp_path, config, 'policy'))


def test_fresh_model_of_transformers_gives_the_same_logits(
    tmp_path: pathlib.Path,
) -> None:
  torch = pytest.importorskip('torch')
  import transformers

  shape = {
      their: getattr(CONFIG, our) for their, our in tensor_names.SIZES.items()
  }
  torch.manual_seed(0)
  theirs = transformers.GemmaForCausalLM(
      transformers.GemmaConfig(**shape, rope_theta=70.0, rms_norm_eps=1e-2)
  )
  with torch.no_grad():
    for name, weight in theirs.named_parameters():
      embedding = 'embed' in name
      weight.normal_(0, 0.3 if 'norm' in name else 0.05 if embedding else 0.25)
  theirs.save_pretrained(tmp_path)
  config = huggingface.read_shape(tmp_path)
  assert (config.rope_theta, config.norm_eps) == (70.0, 1e-2)
  params = huggingface.load_params(tmp_path, config, 'policy')
  assert (
      _difference((config, params, theirs.eval(), tmp_path), Fault.none) < 1e-4
  )


def test_classification_scores_equal_ours(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  torch = pytest.importorskip('torch')
  import transformers

  params, folder = draw('scalar', CONFIG, seed=6), tmp_path / 'hf'
  exporting.save(folder, params, CONFIG, 'scalar', tokenizer)
  model = transformers.AutoModelForSequenceClassification
  theirs, report = model.from_pretrained(folder, output_loading_info=True)
  assert not any(report.values()), report
  assert theirs.num_labels == 1
  tokens, mask = left_padded([12, 5, 9, 1], 12, seed=7)
  for t, m in [(tokens, mask), (tokens[:, ::-1], mask[:, ::-1])]:
    t, m = np.ascontiguousarray(t), np.ascontiguousarray(m)
    with torch.no_grad():
      want = theirs(
          torch.from_numpy(t).long(), attention_mask=torch.from_numpy(m).long()
      ).logits[:, 0]
    ours = masking.end_scores(_scores(CONFIG, params, t, m), m)
    np.testing.assert_allclose(ours, want, atol=1e-4)
  assert np.ptp(want.numpy()) > 0.1
  theirs.save_pretrained(tmp_path / 'back')
  _equal(params, huggingface.load_params(tmp_path / 'back', CONFIG, 'scalar'))


def test_tokenizer_and_generation_config_load(
    tokenizer: Any, pair: tuple
) -> None:
  import transformers

  *_, theirs, folder = pair
  found = transformers.AutoTokenizer.from_pretrained(folder)
  # transformers 4 reads these names.
  config = json.loads((folder / 'config.json').read_text())
  assert config['rope_theta'] == 500.0
  assert config['torch_dtype'] == 'float32'
  settings = json.loads((folder / 'tokenizer_config.json').read_text())
  assert settings['tokenizer_class'] == 'PreTrainedTokenizerFast'
  text = 'the cat ran <eos> away\n'
  assert found(text)['input_ids'] == tokenizer(text)['input_ids']
  ids = (found.pad_token_id, found.eos_token_id, found.bos_token_id)
  assert ids == (0, 1, 2)
  generation = transformers.GenerationConfig.from_pretrained(folder)
  assert generation.eos_token_id == theirs.config.eos_token_id == 1
  assert (generation.pad_token_id, generation.bos_token_id) == (0, 2)


# Reward models in the authors' names.


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
  _equal(params, huggingface.load_params(tmp_path, TINY, 'scalar'))


# config.json.

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
      dataclasses.replace(CONFIG, rope_theta=theta, norm_eps=eps)
  )


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'model_type': 'gemma2'}, "model_type is 'gemma2'; only Gemma 1"),
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


# Bad folders.


@pytest.fixture
def export(tokenizer: Any, tmp_path: pathlib.Path) -> pathlib.Path:
  """A whole policy."""
  folder = tmp_path / 'export'
  params = draw('policy', CONFIG, seed=4)
  exporting.save(folder, params, CONFIG, 'policy', tokenizer)
  return folder


def test_every_mismatch_is_listed(export: pathlib.Path) -> None:
  tensors = load_file(export / 'model.safetensors')
  del tensors['model.norm.weight']
  tensors['model.layers.1.mlp.up_proj.weight'] = np.zeros((24, 36), np.float32)
  tensors['model.layers.0.mlp.up_proj.weight'] = np.zeros((36, 24), np.int8)
  tensors['model.layers.3.mlp.up_proj.weight'] = np.zeros((36, 24), np.float32)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  save_file(tensors, export / 'model.safetensors')
  with pytest.raises(ValueError, match='does not fit a policy') as error:
    huggingface.load_params(export, CONFIG, 'policy')
  assert sorted(str(error.value).split('\n  ')[1:]) == [
      'model.layers.0.mlp.up_proj.weight is of type I8; needs one of '
      "('F64', 'F32', 'F16', 'BF16')",
      'model.layers.1.mlp.up_proj.weight has shape [24, 36]; needs [36, 24]',
      'model.layers.3.mlp.up_proj.weight is not part of this model',
      'model.norm.weight is missing; needs shape [24]',
  ]


def test_a_policy_is_no_scalar_model(export: pathlib.Path) -> None:
  with pytest.raises(ValueError, match='score.weight is missing'):
    huggingface.load_params(export, CONFIG, 'scalar')


def test_broken_and_foreign_files_are_named(export: pathlib.Path) -> None:
  file = export / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-10])
  with pytest.raises(ValueError, match='model.safetensors .* not a whole'):
    huggingface.load_params(export, CONFIG, 'policy')
  file.write_text('version https://git-lfs.github.com/spec/v1')
  with pytest.raises(ValueError, match=r'\(42 bytes\) is not a whole'):
    huggingface.load_params(export, CONFIG, 'policy')


def test_pickles_are_refused_with_the_reason(export: pathlib.Path) -> None:
  (export / 'model.safetensors').rename(export / 'pytorch_model.bin')
  with pytest.raises(FileNotFoundError, match='pytorch_model.bin.*runs the'):
    huggingface.load_params(export, CONFIG, 'policy')


def test_index_stays_inside_the_folder(export: pathlib.Path) -> None:
  (export / 'model.safetensors').rename(export / 'a.safetensors')
  names = {'x': '../b.safetensors', 'y': 'a.safetensors', 'z': 'c.safetensors'}
  index = export / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': names}))
  with pytest.raises(ValueError, match=r"\['../b.*missing: \['c.safe"):
    huggingface.load_params(export, CONFIG, 'policy')


# Writing.


def test_nothing_is_left_of_a_failed_export(
    tokenizer: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def full(*_: Any) -> None:
    assert any(tmp_path.rglob('model.safetensors'))  # it comes late
    raise OSError('no space left')

  monkeypatch.setattr(exporting, '_write_configs', full)
  params = draw('policy', CONFIG, seed=4)
  with pytest.raises(OSError, match='no space'):
    exporting.save(tmp_path / 'hf', params, CONFIG, 'policy', tokenizer)
  assert not any(tmp_path.iterdir())


def test_a_folder_is_replaced_only_on_request(
    export: pathlib.Path, tokenizer: Any
) -> None:
  (export / 'note.txt').write_text('mine')
  params = draw('scalar', CONFIG, seed=5)
  arguments = (export, params, CONFIG, 'scalar', tokenizer)
  with pytest.raises(FileExistsError, match='export is there and not empty'):
    exporting.save(*arguments)
  assert (export / 'note.txt').exists()
  exporting.save(*arguments, overwrite=True)
  assert not (export / 'note.txt').exists()
  _equal(params, huggingface.load_params(export, CONFIG, 'scalar'))
  assert list(export.parent.iterdir()) == [export]


def test_config_comes_last_where_rename_is_not_atomic(
    export: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  order, target = [], tmp_path / 'bucket'
  target.mkdir()
  (target / 'config.json').write_text('old')
  (target / 'old.safetensors').write_text('old')

  class Recording(type(exporting.epath.Path(target))):

    def unlink(self, *args: Any) -> None:
      order.append(f'-{self.name}')
      super().unlink(*args)

    def __truediv__(self, name: str) -> Any:
      order.append(f'+{name}')
      return super().__truediv__(name)

  exporting._upload(export, Recording(target))
  assert order[:2] == ['-config.json', '-old.safetensors']
  assert order[-1] == '+config.json'
  assert {p.name for p in target.iterdir()} == {
      p.name for p in export.iterdir()
  }


def test_too_large_a_tokenizer_is_refused(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  small = dataclasses.replace(CONFIG, vocab_size=50)
  with pytest.raises(ValueError, match='only 50 rows'):
    exporting.save(tmp_path / 'hf', {}, small, 'policy', tokenizer)


# Finding.


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


def test_resolve_offline_names_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  with pytest.raises(
      FileNotFoundError, match="'user/no-such-model' is neither"
  ):
    huggingface.resolve('user/no-such-model')
