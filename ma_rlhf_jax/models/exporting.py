"""Hugging Face folders out: config.json, safetensors and the tokenizer.

The tables are in `tensor_names`. `transformers` writes the tokenizer; PyTorch
is not needed.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ma_rlhf_jax.models import lora
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.models.tensor_names import (
    CAPS,
    FULL,
    INDEX,
    SINGLE,
    SIZES,
    SLIDING,
    Tensor,
    list_tensors,
    to_theirs,
)
from ma_rlhf_jax.structs import Array, Params

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_ARCHITECTURES = {
    'policy': 'ForCausalLM',
    'scalar': 'ForSequenceClassification',
}
_CLASSES = {'gemma': 'Gemma', 'gemma2': 'Gemma2'}
_MAX_SHARD_BYTES = 5 * 10**9
_CONTEXT = 8192  # tokens Gemma was trained on; nothing here depends on it


def save(
    folder: str | os.PathLike[str],
    params: Params,
    config: GemmaConfig,
    kind: str,
    tokenizer: 'PreTrainedTokenizerBase',
    *,
    dtype: str | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
  """Writes a folder that `transformers` 4 and 5 load.

  A local folder appears whole or not at all. In a bucket config.json is
  written last, so a folder without it is not whole. Every process must call
  this; the first one writes.

  Args:
    folder: where, also gs://.
    params: the parameters, on any shardings; adapters are merged into their
      kernels in float32.
    config: their shape.
    kind: 'policy' or 'scalar'.
    tokenizer: written beside them; gives the special ids.
    dtype: of the tensors; None keeps that of each parameter.
    max_shard_bytes: cut into files of at most this size (or one tensor).
    overwrite: replace a folder that is there.

  Raises:
    FileExistsError: if there is such a folder, not empty, and no `overwrite`.
    ValueError: if the tokenizer has more entries than the embedding rows.
  """
  target = epath.Path(folder)
  if not overwrite and target.exists() and any(target.iterdir()):
    raise FileExistsError(
        f'{target} is there and not empty; choose another folder or remove it'
    )
  if len(tokenizer) > config.vocab_size:
    raise ValueError(
        f'{target}: the tokenizer has {len(tokenizer)} entries, the embedding '
        f'only {config.vocab_size} rows; this is not the tokenizer of the model'
    )
  local = '://' not in os.fspath(folder)
  if local:
    target.parent.mkdir(parents=True, exist_ok=True)
  beside = {'dir': target.parent, 'prefix': f'.{target.name}-'} if local else {}
  with tempfile.TemporaryDirectory(**beside) as scratch:
    draft = pathlib.Path(scratch) / 'new'
    draft.mkdir()
    leaves = lora.flatten(params)
    tensors = list_tensors(kind, config)
    scale = config.lora.scale if config.lora else 0.0
    to_host = functools.partial(_to_host, leaves, scale=scale, dtype=dtype)
    _write_tensors(draft, leaves, tensors, to_host, dtype, max_shard_bytes)
    if jax.process_index() == 0:
      _write_tokenizer(draft, tokenizer)
      written = str(jnp.dtype(dtype or leaves[tensors[0].path].dtype))
      _write_configs(draft, config, kind, tokenizer, written)
      (_rename if local else _upload)(draft, target)


def _write_tensors(
    draft: pathlib.Path,
    leaves: Mapping[str, Array],
    tensors: Sequence[Tensor],
    to_host: Callable[[Tensor], np.ndarray],
    dtype: str | None,
    max_shard_bytes: int,
) -> None:
  """Writes the tensors as one file, or as shards and an index."""
  size = lambda t: (
      math.prod(t.shape) * jnp.dtype(dtype or leaves[t.path].dtype).itemsize
  )
  shards, room = [[]], max_shard_bytes
  for tensor in tensors:
    if shards[-1] and size(tensor) > room:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(tensor)
    room -= size(tensor)
  weight_map = {}
  for number, shard in enumerate(shards, 1):
    name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    name = SINGLE if len(shards) == 1 else name
    weight_map |= {tensor.name: name for tensor in shard}
    host = {tensor.name: to_host(tensor) for tensor in shard}
    if jax.process_index() == 0:
      save_file(host, draft / name, metadata={'format': 'pt'})
  if len(shards) > 1:
    total = {'total_size': sum(map(size, tensors))}
    _write_json(draft / INDEX, {'metadata': total, 'weight_map': weight_map})


def _to_host(
    leaves: Mapping[str, Array],
    tensor: Tensor,
    *,
    scale: float,
    dtype: str | None,
) -> np.ndarray:
  """One tensor of theirs, what its adapter adds included."""
  layer = lambda x: x if tensor.layer is None else x[tensor.layer]
  ours = layer(leaves[tensor.path])
  dtype = jnp.dtype(dtype or ours.dtype)
  if adapter := lora.adapters(leaves, tensor.path):
    ours = lora.merged(ours, *map(layer, adapter), scale)
  if isinstance(ours, jax.Array) and not ours.is_fully_addressable:
    ours = multihost_utils.process_allgather(ours, tiled=True)
  theirs = to_theirs(np.asarray(ours), tensor.inputs)
  return np.ascontiguousarray(theirs, dtype)


def _write_tokenizer(
    draft: pathlib.Path, tokenizer: 'PreTrainedTokenizerBase'
) -> None:
  """The tokenizer's files, with a class name that 4.x knows too."""
  tokenizer.save_pretrained(draft)
  path = draft / 'tokenizer_config.json'
  content = json.loads(path.read_text())
  if content['tokenizer_class'] == 'TokenizersBackend':  # the name since 5.0
    content['tokenizer_class'] = 'PreTrainedTokenizerFast'
  _write_json(path, content)


def _write_configs(
    draft: pathlib.Path,
    config: GemmaConfig,
    kind: str,
    tokenizer: 'PreTrainedTokenizerBase',
    dtype: str,
) -> None:
  """config.json, and generation_config.json for a policy."""
  shared = {
      **{n: getattr(tokenizer, n) for n in ('bos_token_id', 'eos_token_id')},
      'pad_token_id': tokenizer.pad_token_id,
      'transformers_version': importlib.metadata.version('transformers'),
  }
  shape = {
      'architectures': [_CLASSES[config.family] + _ARCHITECTURES[kind]],
      'model_type': config.family,
      **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
      'hidden_act': 'gelu_pytorch_tanh',
      'hidden_activation': 'gelu_pytorch_tanh',
      'rms_norm_eps': config.norm_eps,
      'rope_theta': config.rope_theta,  # 4.x reads this, 5 the next
      'rope_parameters': {
          'rope_type': 'default',
          'rope_theta': config.rope_theta,
      },
      'attention_bias': False,
      'attention_dropout': 0.0,
      'tie_word_embeddings': True,
      'max_position_embeddings': _CONTEXT,
      'dtype': dtype,
      'torch_dtype': dtype,  # the name in 4.x
  }
  if config.family == 'gemma2':
    shape |= _gemma2_fields(config)
  if kind == 'scalar':
    shape |= {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
  else:
    _write_json(draft / 'generation_config.json', shared)
  _write_json(draft / 'config.json', {**shape, **shared})


def _gemma2_fields(config: GemmaConfig) -> dict[str, Any]:
  slides = config.sliding_layers or (False,) * config.num_layers
  scalar = config.query_pre_attn_scalar or config.head_dim
  return {
      # transformers 5 takes whole numbers only.
      'query_pre_attn_scalar': int(scalar) if scalar == int(scalar) else scalar,
      **{
          theirs: getattr(config, ours) or None for theirs, ours in CAPS.items()
      },
      'sliding_window': config.sliding_window or None,
      'layer_types': [SLIDING if s else FULL for s in slides],
      'use_bidirectional_attention': None,
  }


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n')


def _rename(draft: pathlib.Path, target: epath.Path) -> None:
  """Puts the folder in place; what was there moves into the scratch folder."""
  if target.exists():
    target.rename(draft.with_name('old'))
  draft.rename(target)


def _upload(draft: pathlib.Path, target: epath.Path) -> None:
  """Copies the files, config.json last."""
  target.mkdir(parents=True, exist_ok=True)
  for old in sorted(target.iterdir(), key=lambda p: p.name != 'config.json'):
    old.unlink()
  for new in sorted(draft.iterdir(), key=lambda p: p.name == 'config.json'):
    epath.Path(new).copy(target / new.name)
