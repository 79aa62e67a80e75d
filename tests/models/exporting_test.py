"""Tests of `models.exporting`."""

import copy
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from ma_rlhf_jax import manifest
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.data import tokenizer_files
from ma_rlhf_jax.models import exporting, folders, heads, huggingface
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.mesh import make_mesh
from tests.models.drawn import UNUSUAL, UNUSUAL_2, assert_same_bits, draw

# Neither bounds nor windows, which Gemma 2 has where a file is silent.
UNBOUNDED = dataclasses.replace(
    UNUSUAL, family='gemma2', query_pre_attn_scalar=10.0
)


# Every two of the choices meet once.
@pytest.mark.parametrize(
    ('kind', 'dtype', 'shard_bytes'),
    [
        ('policy', 'float32', 10**9),
        ('policy', 'bfloat16', 20_000),
        ('scalar', 'float32', 20_000),
        ('scalar', 'bfloat16', 10**9),
    ],
)
def test_round_trip_is_bit_identical(
    kind: str,
    dtype: str,
    shard_bytes: int,
    tokenizer: Any,
    tmp_path: pathlib.Path,
) -> None:
  config = dataclasses.replace(UNUSUAL, param_dtype=dtype)
  params, folder = draw(kind, config, seed=4), tmp_path / 'hf'
  exporting.save(
      folder, params, config, kind, tokenizer, max_shard_bytes=shard_bytes
  )
  found = huggingface.load_params(folder, config, kind)
  assert_same_bits(params, found)
  shape = dataclasses.replace(UNUSUAL, param_dtype='float32')
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
  params, folder = draw('policy', UNUSUAL, seed=4), tmp_path / 'hf'
  exporting.save(folder, params, UNUSUAL, 'policy', tokenizer, dtype='bfloat16')
  assert json.loads((folder / 'config.json').read_text())['dtype'] == 'bfloat16'
  rounded = jax.tree.map(
      lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32), params
  )
  assert_same_bits(rounded, huggingface.load_params(folder, UNUSUAL, 'policy'))


def test_parameters_come_from_and_go_onto_a_mesh(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  params = draw('scalar', UNUSUAL, seed=4)
  mesh = make_mesh(ConfigDict({'data': 2, 'fsdp': 2, 'tensor': 2}))
  with jax.set_mesh(mesh):
    like = heads.abstract_params('scalar', UNUSUAL)
    spread = jax.device_put(params, jax.tree.map(lambda x: x.sharding, like))
    exporting.save(tmp_path / 'hf', spread, UNUSUAL, 'scalar', tokenizer)
    found = huggingface.load_params(tmp_path / 'hf', UNUSUAL, 'scalar')
  assert_same_bits(params, found)
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True)
  assert all(x.sharding == y.sharding for x, y in pairs)
  embedding = found['backbone']['embedding'].addressable_shards[0]
  assert embedding.data.shape == (160, 12)


def test_a_disk_that_fills_up_leaves_nothing(
    tokenizer: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  written = []

  def fills_up(tensors: Any, path: pathlib.Path, **more: Any) -> None:
    if len(written) == 2:
      raise safetensors.SafetensorError(
          'I/O error: No space left on device (os error 28)'
      )
    save_file(tensors, path, **more)
    written.append(path.stat().st_size)

  monkeypatch.setattr(exporting, 'save_file', fills_up)
  params = draw('policy', UNUSUAL, seed=4)
  arguments = (tmp_path / 'hf', params, UNUSUAL, 'policy', tokenizer)
  with pytest.raises(folders.NoSpaceError, match='hf: no space left'):
    exporting.save(*arguments, max_shard_bytes=20_000)
  assert len(written) == 2 and min(written) > 10_000
  assert not any(tmp_path.iterdir())


def test_a_folder_is_replaced_only_on_request(
    export: pathlib.Path, tokenizer: Any
) -> None:
  (export / 'note.txt').write_text('mine')
  params = draw('scalar', UNUSUAL, seed=5)
  arguments = (export, params, UNUSUAL, 'scalar', tokenizer)
  with pytest.raises(FileExistsError, match='export is there and not empty'):
    exporting.save(*arguments)
  assert (export / 'note.txt').exists()
  exporting.save(*arguments, overwrite=True)
  assert not (export / 'note.txt').exists()
  assert_same_bits(params, huggingface.load_params(export, UNUSUAL, 'scalar'))
  assert list(export.parent.iterdir()) == [export]


def test_too_large_a_tokenizer_is_refused(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  small = dataclasses.replace(UNUSUAL, vocab_size=50)
  with pytest.raises(ValueError, match='only 50 rows'):
    exporting.save(tmp_path / 'hf', {}, small, 'policy', tokenizer)


def _as_transformers_writes(
    config: GemmaConfig, kind: str, folder: pathlib.Path
) -> dict[str, Any]:
  """The config.json of the same model, made by the class of transformers."""
  import transformers

  name = {'gemma': 'Gemma', 'gemma2': 'Gemma2'}[config.family]
  head = {'policy': 'CausalLM', 'scalar': 'SequenceClassification'}[kind]
  slides = config.sliding_layers or (False,) * config.num_layers
  of_gemma2 = {
      'query_pre_attn_scalar': int(config.query_pre_attn_scalar),
      'attn_logit_softcapping': config.attn_softcap or None,
      'final_logit_softcapping': config.final_softcap or None,
      'sliding_window': config.sliding_window or 4096,
      'layer_types': [
          'sliding_attention' if s else 'full_attention' for s in slides
      ],
  }
  made = getattr(transformers, f'{name}Config')(
      vocab_size=320,
      num_hidden_layers=3,
      hidden_size=24,
      intermediate_size=36,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=10,
      rms_norm_eps=1e-3,
      rope_parameters={'rope_type': 'default', 'rope_theta': 500.0},
      architectures=[f'{name}For{head}'],
      dtype='bfloat16',
      **(of_gemma2 if name == 'Gemma2' else {}),
      **({'num_labels': 1} if kind == 'scalar' else {}),
  )
  made.save_pretrained(folder)
  return json.loads((folder / 'config.json').read_text())


@pytest.mark.parametrize('kind', ['policy', 'scalar'])
@pytest.mark.parametrize('config', [UNUSUAL, UNUSUAL_2, UNBOUNDED])
def test_config_is_what_transformers_writes(
    config: GemmaConfig, kind: str, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  params = draw(kind, config, seed=4)
  arguments = (tmp_path / 'hf', params, config, kind, tokenizer)
  exporting.save(*arguments, dtype='bfloat16')
  ours = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  # What transformers 4 reads under other names.
  assert ours.pop('torch_dtype') == 'bfloat16'
  assert ours.pop('rope_theta') == 500.0
  if config.family == 'gemma':
    assert ours.pop('hidden_activation') == 'gelu_pytorch_tanh'
  theirs = _as_transformers_writes(config, kind, tmp_path / 'theirs')
  assert ours == theirs
  assert list(ours) == sorted(ours)
  names = {p.name for p in (tmp_path / 'hf').iterdir()}
  assert ('generation_config.json' in names) == (kind == 'policy')
  tensors = load_file(tmp_path / 'hf' / 'model.safetensors')
  assert 'lm_head.weight' not in tensors
  assert ('score.weight' in tensors) == (kind == 'scalar')


@pytest.mark.parametrize('config', [UNUSUAL_2, UNBOUNDED])
def test_gemma2_comes_back_as_it_was(
    config: GemmaConfig, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  params = draw('scalar', config, seed=4)
  exporting.save(tmp_path / 'hf', params, config, 'scalar', tokenizer)
  assert huggingface.read_shape(tmp_path / 'hf') == config
  found = huggingface.load_params(tmp_path / 'hf', config, 'scalar')
  assert_same_bits(params, found)


_TURNS = ['<start_of_turn>', '<end_of_turn>']
_CHAT = "{% for m in messages %}<start_of_turn>{{ m['content'] }}{% endfor %}"
# What a tokenizer makes of text, by whichever transformers runs it.
_ASK = """
import json, sys
from transformers import AutoTokenizer
t = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([
    [t(x)['input_ids'] for x in ['the cat', '<start_of_turn>a<end_of_turn>']],
    sorted(t.all_special_tokens),
    [t.bos_token_id, t.eos_token_id, t.pad_token_id, len(t)],
    t.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False),
]))
"""


@pytest.fixture
def with_turns(tokenizer: Any, tmp_path: pathlib.Path) -> pathlib.Path:
  """An export whose tokenizer has tokens of turns, as Gemma's has."""
  source, folder = tmp_path / 'source', tmp_path / 'written'
  exporting.write_tokenizer(source, tokenizer)
  path = source / 'tokenizer_config.json'
  settings = json.loads(path.read_text()) | {
      'additional_special_tokens': _TURNS,
      'chat_template': _CHAT,
  }
  path.write_text(json.dumps(settings))
  exporting.write_tokenizer(folder, tokenizer_files.load(str(source)))
  return folder


def test_additional_special_tokens_are_written_as_transformers_4_reads_them(
    with_turns: pathlib.Path,
) -> None:
  settings = json.loads((with_turns / 'tokenizer_config.json').read_text())
  # A list of that name ends 4.57: 'list' object has no attribute 'keys'.
  assert not isinstance(settings.get('extra_special_tokens'), list)
  assert settings['additional_special_tokens'] == _TURNS
  found = tokenizer_files.load(str(with_turns))
  assert set(_TURNS) < set(found.all_special_tokens)
  assert len(found.encode(_TURNS[0], add_special_tokens=False)) == 1
  assert found.chat_template == _CHAT


@pytest.mark.slow
def test_transformers_4_and_5_make_the_same_of_a_tokenizer(
    with_turns: pathlib.Path,
) -> None:
  other = os.environ.get('MA_RLHF_TRANSFORMERS_4')
  if not other:
    pytest.skip('MA_RLHF_TRANSFORMERS_4 names no Python with transformers 4.57')
  ask = lambda python: json.loads(
      subprocess.run(
          [python, '-c', _ASK, str(with_turns)],
          check=True,
          capture_output=True,
          text=True,
      ).stdout
  )
  assert ask(other) == ask(sys.executable)


def test_the_tokenizer_adds_no_token_types_in_transformers_4(
    export: pathlib.Path,
) -> None:
  # PreTrainedTokenizerFast of 4.57 adds them, and `generate` refuses them.
  settings = json.loads((export / 'tokenizer_config.json').read_text())
  assert settings['tokenizer_class'] == 'PreTrainedTokenizerFast'
  assert settings['model_input_names'] == ['input_ids', 'attention_mask']
  assert 'is_local' not in settings and 'local_files_only' not in settings


def test_the_manifest_lists_what_is_fetched_of_a_folder(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  talking = copy.deepcopy(tokenizer)
  talking.chat_template = '{{ messages }}'  # a file that is not fetched
  params = draw('policy', UNUSUAL, seed=4)
  exporting.save(tmp_path / 'hf', params, UNUSUAL, 'policy', talking)
  names = {path.name for path in (tmp_path / 'hf').iterdir()}
  assert set(manifest.read(tmp_path / 'hf')) == {
      'config.json',
      'generation_config.json',
      'model.safetensors',
      'tokenizer.json',
      'tokenizer_config.json',
  }
  assert 'chat_template.jinja' in names
  assert manifest.verify(tmp_path / 'hf')


def test_a_tokenizer_is_written_the_same_when_it_was_read_back(
    tmp_path: pathlib.Path,
) -> None:
  trained, first, again = (tmp_path / name for name in ('t', '1', '2'))
  tokenizer_lib.train_tokenizer(['My boss was late. TL;DR:'], 300, str(trained))
  for source, folder in ((trained, first), (first, again)):
    folder.mkdir()
    loaded = tokenizer_lib.load_tokenizer(str(source))
    exporting.write_tokenizer(folder, loaded)
  for path in first.iterdir():
    assert (again / path.name).read_bytes() == path.read_bytes(), path.name
