"""Tests of `models.weight_files`: every kind of bad folder."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import random
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ma_rlhf_jax.models import huggingface
from tests.data.files_test import ARCHIVE, LFS, PAGE, PICKLE
from tests.models.drawn import TINY, UNUSUAL, draw, their_tensors

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
FIRST, SECOND = (f'model-0000{n}-of-00002.safetensors' for n in (1, 2))
NORM, UP = 'model.norm.weight', 'model.layers.1.mlp.up_proj.weight'
EMBEDDING = 'model.embed_tokens.weight'

Tensors = dict[str, np.ndarray]


@pytest.fixture
def never_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(
      huggingface.streaming, 'stream', lambda *_: pytest.fail('allocated')
  )


@pytest.fixture
def shards(export: pathlib.Path) -> pathlib.Path:
  """A whole policy in two files and an index without total_size."""
  tensors = load_file(export / SINGLE)
  (export / SINGLE).unlink()
  names = list(tensors)
  parts = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
  for file, part in parts.items():
    save_file({name: tensors[name] for name in part}, export / file)
  _write_index(export, {n: file for file, part in parts.items() for n in part})
  return export


def _index(folder: pathlib.Path) -> dict[str, str]:
  return json.loads((folder / INDEX).read_text())['weight_map']


def _write_index(folder: pathlib.Path, weight_map: Any) -> None:
  (folder / INDEX).write_text(json.dumps({'weight_map': weight_map}))


def _changed(path: pathlib.Path, change: Callable[[Tensors], Any]) -> None:
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


def _refused(folder: pathlib.Path) -> str:
  """The one message that both checking and loading give."""
  messages = []
  for use in (huggingface.check_params, huggingface.load_params):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
      use(folder, UNUSUAL, 'policy')
    messages.append(str(error.value))
  assert messages[0] == messages[1]
  return messages[0]


@pytest.mark.usefixtures('never_allocated')
def test_every_mismatch_is_listed(export: pathlib.Path) -> None:
  def spoil(tensors: Tensors) -> None:
    del tensors[NORM]
    tensors[UP] = np.zeros((24, 36), np.float32)
    tensors[UP.replace('1', '0')] = np.zeros((36, 24), np.int8)
    tensors[UP.replace('1', '3')] = np.zeros((36, 24), np.float32)
    tensors[EMBEDDING] = np.zeros((310, 24), np.float32)

  _changed(export / SINGLE, spoil)
  first, *lines = _refused(export).split('\n  ')
  assert first == (
      f'{export} does not fit a policy (CausalLM) of the shape that its '
      'config.json gives; download it again, or name another folder:'
  )
  assert sorted(lines) == [
      f'{EMBEDDING} (model.safetensors) has shape [310, 24]; needs [320, 24], '
      'as vocab_size and hidden_size of config.json say',
      'model.layers.0.mlp.up_proj.weight (model.safetensors) is of type I8; '
      "needs one of ('F64', 'F32', 'F16', 'BF16')",
      f'{UP} (model.safetensors) has shape [24, 36]; needs [36, 24]',
      'model.layers.3.mlp.up_proj.weight (model.safetensors) is not part of '
      'this model',
      f'{NORM} is missing; needs shape [24]',
  ]


def test_two_files_load_as_one(shards: pathlib.Path) -> None:
  found = huggingface.load_params(shards, UNUSUAL, 'policy')
  want = draw('policy', UNUSUAL, seed=4)['layers']['mlp']['up']
  np.testing.assert_array_equal(found['layers']['mlp']['up'], want)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (LFS, 'is a pointer of git lfs, not the file itself; run'),
        (PAGE, 'is a web page'),
        (ARCHIVE, 'is a zip archive, as PyTorch writes'),
        (PICKLE, 'is a pickle, which runs the code'),
        (b'', r'\(0 bytes\) is not a whole safetensors file'),
        (b'\1\2', r'\(2 bytes\) is not a whole safetensors file'),
        (bytes(100), 'a header of 0 bytes'),
        (b'some text, and then some more', 'is not a whole safetensors file'),
        (struct.pack('<Q', 2**63) + b'{' * 99, 'header of 9223372036854775808'),
        (struct.pack('<Q', 99) + b'{' * 99, 'is not a whole safetensors file'),
        (
            struct.pack('<Q', 17 * 2**20) + b'{' + bytes(17 * 2**20),
            r'a header of 17825792 bytes \(at most 16777216 are read\)',
        ),
    ],
)
@pytest.mark.usefixtures('never_allocated')
def test_what_is_no_safetensors_is_named(
    content: bytes, message: str, shards: pathlib.Path
) -> None:
  (shards / SECOND).write_bytes(content)
  found = _refused(shards)
  assert found.startswith(f'{shards / SECOND} ')
  with pytest.raises(ValueError, match=message):
    raise ValueError(found)


@pytest.mark.usefixtures('never_allocated')
def test_a_truncated_shard_is_named_with_both_sizes(
    shards: pathlib.Path,
) -> None:
  whole = (shards / SECOND).read_bytes()
  (shards / SECOND).write_bytes(whole[:-10])
  assert _refused(shards).startswith(
      f'{shards / SECOND} ({len(whole) - 10} bytes) is not a whole safetensors '
      f'file, which has {len(whole)}; download it again: '
  )
  (shards / SECOND).write_bytes(whole[:100])
  assert 'is not a whole safetensors file' in _refused(shards)


@pytest.mark.usefixtures('never_allocated')
def test_a_header_of_many_tensors_is_refused(export: pathlib.Path) -> None:
  tensors = {str(i): np.zeros(1, np.int8) for i in range(10_001)}
  save_file(tensors, export / SINGLE)
  assert 'to 10001; at most 10000 are read' in _refused(export)


_OUTSIDE = [
    '../model.safetensors',
    '/etc/passwd',
    '/x.safetensors',
    '..\\x.safetensors',
    'https://host/x.safetensors',
    '',
    'x\0.safetensors',
    'x' * 5000 + '.safetensors',
    '..',
    'x.bin',
    5,
    ['x.safetensors'],
    None,
]


@pytest.mark.parametrize('name', _OUTSIDE, ids=range(len(_OUTSIDE)))
@pytest.mark.usefixtures('never_allocated')
def test_an_index_names_files_beside_it(
    name: Any, shards: pathlib.Path
) -> None:
  (shards.parent / SINGLE).write_bytes((shards / SECOND).read_bytes())
  _write_index(shards, _index(shards) | {NORM: name})
  message = _refused(shards)
  assert message.startswith(f'{shards / INDEX} must name files beside it')
  assert len(message) < 500


def test_a_link_out_of_the_folder_is_a_file_like_any_other(
    shards: pathlib.Path,
) -> None:
  # So the hub's cache is built; a link to something else is not safetensors.
  (shards / SECOND).rename(shards.parent / 'blob')
  (shards / SECOND).symlink_to(shards.parent / 'blob')
  huggingface.check_params(shards, UNUSUAL, 'policy')
  (shards / SECOND).unlink()
  (shards / SECOND).symlink_to('/etc/passwd')
  assert 'is not a whole safetensors file' in _refused(shards)


@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        (lambda m: m | {NORM: FIRST}, f'{NORM} is in {SECOND}; the index has'),
        (lambda m: m | {'x': FIRST}, f'x is missing from {FIRST}, where the'),
        (
            lambda m: {n: f for n, f in m.items() if n != NORM},
            f'{NORM} is in {SECOND}; the index lacks it',
        ),
    ],
)
@pytest.mark.usefixtures('never_allocated')
def test_an_index_must_agree_with_its_files(
    change: Callable, problem: str, shards: pathlib.Path
) -> None:
  assert _index(shards)[NORM] == SECOND
  _write_index(shards, change(_index(shards)))
  first, line = _refused(shards).split('\n  ')
  assert first.startswith(f'{shards / INDEX} does not fit the files beside it')
  assert line.startswith(problem)


@pytest.mark.usefixtures('never_allocated')
def test_a_tensor_in_two_files_is_refused(shards: pathlib.Path) -> None:
  norm = load_file(shards / SECOND)[NORM]
  _changed(shards / FIRST, lambda t: t.update({NORM: norm}))
  assert f'{NORM} is in {FIRST} and in {SECOND}' in _refused(shards)


@pytest.mark.usefixtures('never_allocated')
def test_a_missing_shard_is_named(shards: pathlib.Path) -> None:
  (shards / FIRST).unlink()
  assert f"download them again: ['{FIRST}']" in _refused(shards)


@pytest.mark.parametrize('weight_map', [None, [], {}, 'x', 3])
@pytest.mark.usefixtures('never_allocated')
def test_an_index_without_a_map_is_refused(
    weight_map: Any, shards: pathlib.Path
) -> None:
  _write_index(shards, weight_map)
  assert 'it must give the file of each tensor' in _refused(shards)


@pytest.mark.parametrize('end', ['bin', 'pt', 'pth', 'pkl', 'ckpt'])
@pytest.mark.usefixtures('never_allocated')
def test_pickles_are_refused_with_the_reason(
    end: str, export: pathlib.Path
) -> None:
  (export / SINGLE).rename(export / f'pytorch_model.{end}')
  assert _refused(export) == (
      f'{export} holds neither {SINGLE} nor {INDEX}, only pickles '
      f'(pytorch_model.{end}); a pickle runs the code in it when it is read, '
      'so save the model once with safetensors'
  )


@pytest.mark.usefixtures('never_allocated')
def test_no_weights_and_adapters_are_told_apart(export: pathlib.Path) -> None:
  (export / SINGLE).unlink()
  assert 'name the folder of a whole model' in _refused(export)
  (export / 'adapter_model.safetensors').touch()
  assert 'is a LoRA adapter, so merge it into its base' in _refused(export)


def _load(folder: pathlib.Path) -> dict[str, Any]:
  return huggingface.load_params(folder, UNUSUAL, 'policy')


@pytest.mark.parametrize(
    'dtype', [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
)
def test_weights_that_are_no_numbers_are_counted(
    dtype: type, shards: pathlib.Path
) -> None:
  def spoil(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP].astype(dtype)
    tensors[UP][3, 4:6] = np.nan, np.inf
    tensors[UP][35, 23] = -np.inf

  file = shards / _index(shards)[UP]
  _changed(file, spoil)
  with pytest.raises(ValueError) as error:
    _load(shards)
  assert str(error.value).startswith(
      f'{file}: 3 of 864 values of {UP} are nan or infinite; download'
  )


def test_half_precision_loads(export: pathlib.Path) -> None:
  half = lambda t: t.update({UP: t[UP].astype(np.float16)})
  _changed(export / SINGLE, half)
  want = draw('policy', UNUSUAL, seed=4)['layers']['mlp']['up'][1]
  found = _load(export)['layers']['mlp']['up'][1]
  np.testing.assert_array_equal(
      found, np.asarray(want).astype(np.float16).astype(np.float32)
  )


def test_a_head_that_repeats_the_embedding_is_allowed(
    export: pathlib.Path,
) -> None:
  copied = lambda t: t.update({'lm_head.weight': t[EMBEDDING].copy()})
  _changed(export / SINGLE, copied)
  assert _load(export)['embedding'].shape == (320, 24)
  # The last bit of the last number.
  file = export / SINGLE

  def spoil(tensors: Tensors) -> None:
    tensors['lm_head.weight'].view(np.uint8)[-1, -4] ^= 1

  _changed(file, spoil)
  with pytest.raises(ValueError) as error:
    _load(export)
  assert str(error.value).startswith(
      f'{file}: lm_head.weight differs from the embedding; a head of its own'
  )


@pytest.mark.usefixtures('never_allocated')
def test_a_head_of_another_shape_or_type_is_refused_at_once(
    export: pathlib.Path,
) -> None:
  for head in (np.zeros((320, 23), np.float32), np.zeros((320, 24), np.int8)):
    _changed(export / SINGLE, lambda t, h=head: t.update({'lm_head.weight': h}))
    assert 'lm_head.weight differs from the embedding' in _refused(export)


def test_a_scalar_model_reads_no_old_head(tmp_path: pathlib.Path) -> None:
  tensors = their_tensors('scalar', TINY, draw('scalar', TINY, seed=1))
  tensors['lm_head.weight'] = np.zeros((5, 5), np.float32)
  save_file(tensors, tmp_path / SINGLE)
  huggingface.load_params(tmp_path, TINY, 'scalar')


def test_mutated_headers_and_indices_give_our_errors_only(
    shards: pathlib.Path,
) -> None:
  drawn = random.Random(0)
  path = {'header': shards / FIRST, 'index': shards / INDEX}
  whole = {name: p.read_bytes() for name, p in path.items()}
  refused = {'header': 0, 'index': 0}
  for step in range(400):
    name = ('header', 'index')[step % 2]
    content = bytearray(whole[name])
    for _ in range(drawn.randint(1, 3)):
      content[drawn.randrange(min(len(content), 900))] = drawn.randrange(256)
    path[name].write_bytes(content)
    try:
      huggingface.check_params(shards, UNUSUAL, 'policy')
    except (ValueError, FileNotFoundError):
      refused[name] += 1
    path[name].write_bytes(whole[name])
  assert min(refused.values()) > 100


@pytest.mark.parametrize(
    ('value', 'dtype', 'words'),
    [
        (1e39, 'float32', 'beyond the largest float32'),
        (3.4e38, 'float32', ''),
        (3.4e38, 'bfloat16', 'beyond the largest bfloat16'),
        (-3.397e38, 'bfloat16', 'beyond the largest bfloat16'),
        (-3.39e38, 'bfloat16', ''),
    ],
)
@pytest.mark.parametrize('stored', [np.float64, np.float32])
def test_values_that_a_cast_makes_infinite_are_refused(
    export: pathlib.Path, value: float, dtype: str, words: str, stored: type
) -> None:
  if abs(value) > np.finfo(stored).max:
    return

  def spoil(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP].astype(stored)
    tensors[UP][3, 5] = value

  _changed(export / SINGLE, spoil)
  shape = dataclasses.replace(UNUSUAL, param_dtype=dtype)
  if not words:
    loaded = huggingface.load_params(export, shape)
    assert np.isfinite(np.float32(loaded['layers']['mlp']['up'])).all()
    return
  with pytest.raises(ValueError, match=f'1 of .* of {UP} are {words}'):
    huggingface.load_params(export, shape)
