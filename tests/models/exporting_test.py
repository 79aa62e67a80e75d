"""Tests of `models.exporting`."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
from safetensors.numpy import load_file

from ma_rlhf_jax.models import exporting, heads, huggingface
from ma_rlhf_jax.parallel.mesh import make_mesh
from tests.models.drawn import UNUSUAL, assert_same_bits, draw


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


def test_nothing_is_left_of_a_failed_export(
    tokenizer: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def full(*_: Any) -> None:
    assert any(tmp_path.rglob('model.safetensors'))  # it comes late
    raise OSError('no space left')

  monkeypatch.setattr(exporting, '_write_configs', full)
  params = draw('policy', UNUSUAL, seed=4)
  with pytest.raises(OSError, match='no space'):
    exporting.save(tmp_path / 'hf', params, UNUSUAL, 'policy', tokenizer)
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
  small = dataclasses.replace(UNUSUAL, vocab_size=50)
  with pytest.raises(ValueError, match='only 50 rows'):
    exporting.save(tmp_path / 'hf', {}, small, 'policy', tokenizer)
