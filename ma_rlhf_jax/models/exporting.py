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
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ma_rlhf_jax import manifest
from ma_rlhf_jax.models import folders, lora
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.models.tensor_names import (
    CAPS,
    FETCHED,
    FULL,
    GEMMA2_DEFAULTS,
    INDEX,
    SINGLE,
    SIZES,
    SLIDING,
    Tensor,
    list_tensors,
    to_theirs,
)
from ma_rlhf_jax.parallel import processes
from ma_rlhf_jax.parallel.mesh import gathered
from ma_rlhf_jax.structs import Array, Params

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_ARCHITECTURES = {
    'policy': 'ForCausalLM',
    'scalar': 'ForSequenceClassification',
}
_CLASSES = {'gemma': 'Gemma', 'gemma2': 'Gemma2'}
# The file that transformers looks for first; it marks a folder as whole.
CONFIG = 'config.json'
MAX_SHARD_BYTES = 5 * 10**9
_GELU = 'gelu_pytorch_tanh'
# What is the same in all of them, or has no meaning here.
_CONSTANTS = {
    'attention_bias': False,
    'attention_dropout': 0.0,
    'initializer_range': 0.02,
    'max_position_embeddings': 8192,
    'tie_word_embeddings': True,
    'use_bidirectional_attention': None,
    'use_cache': True,
}


def save(
    folder: str | os.PathLike[str],
    params: Params,
    config: GemmaConfig,
    kind: str,
    tokenizer: 'PreTrainedTokenizerBase',
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
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
    NoSpaceError: if the disk is full; nothing is left then.
    ValueError: if the tokenizer has more entries than the embedding rows.
  """
  if len(tokenizer) > config.vocab_size:
    raise ValueError(
        f'{folder}: the tokenizer has {len(tokenizer)} entries, the embedding '
        f'only {config.vocab_size} rows; this is not the tokenizer of the model'
    )
  with folders.whole(folder, marker=CONFIG, overwrite=overwrite) as draft:
    leaves = lora.flatten(params)
    tensors = list_tensors(kind, config)
    scale = config.lora.scale if config.lora else 0.0
    to_host = functools.partial(_to_host, leaves, scale=scale, dtype=dtype)
    _write_tensors(draft, leaves, tensors, to_host, dtype, max_shard_bytes)
    with processes.together():
      if processes.is_first():
        write_tokenizer(draft, tokenizer)
        written = str(jnp.dtype(dtype or leaves[tensors[0].path].dtype))
        _write_configs(draft, config, kind, tokenizer, written)
        write_manifest(draft)


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
    with processes.together():
      if processes.is_first():
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
  return np.ascontiguousarray(to_theirs(gathered(ours), tensor.inputs), dtype)


def write_tokenizer(
    draft: pathlib.Path, tokenizer: 'PreTrainedTokenizerBase'
) -> None:
  """The tokenizer's files, as `transformers` 4 reads them too."""
  tokenizer.save_pretrained(draft)
  path = draft / 'tokenizer_config.json'
  content = json.loads(path.read_text())
  if content['tokenizer_class'] == 'TokenizersBackend':  # the name since 5.0
    content['tokenizer_class'] = 'PreTrainedTokenizerFast'
  # 5 writes a list where 4.x wants a dict of names; both read the older name.
  if isinstance(content.get('extra_special_tokens'), list):
    extra = content.pop('extra_special_tokens')
    content['additional_special_tokens'] = extra
  # That class adds token types in 4.x, which `generate` refuses.
  content.setdefault('model_input_names', ['input_ids', 'attention_mask'])
  for name in ('is_local', 'local_files_only'):  # how it was read here
    content.pop(name, None)
  # One order, whether the tokenizer was just trained or read back: a resumed
  # run writes the same bytes.
  _write_json(path, dict(sorted(content.items())))


def write_manifest(draft: pathlib.Path) -> None:
  """Digests of what `huggingface` fetches of a folder, and of nothing else."""
  names = [
      path.name
      for path in draft.iterdir()
      if any(path.match(pattern) for pattern in FETCHED)
  ]
  manifest.write(draft, manifest.entries(draft, names))


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
      'rms_norm_eps': config.norm_eps,
      'rope_parameters': {
          'rope_theta': config.rope_theta,
          'rope_type': 'default',
      },
      'dtype': dtype,
      **_CONSTANTS,
      **_FAMILY_FIELDS[config.family](config),
      # 4.x knows these by other names.
      'rope_theta': config.rope_theta,
      'torch_dtype': dtype,
  }
  if kind == 'scalar':
    shape |= {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
  else:
    _write_json(draft / 'generation_config.json', shared)
  _write_json(draft / CONFIG, dict(sorted({**shape, **shared}.items())))


def _gemma_fields(config: GemmaConfig) -> dict[str, Any]:
  # 5 reads the first; of 4.x some releases read the first, some the second.
  return dict.fromkeys(('hidden_act', 'hidden_activation'), _GELU)


def _gemma2_fields(config: GemmaConfig) -> dict[str, Any]:
  slides = config.sliding_layers or (False,) * config.num_layers
  scalar = config.query_pre_attn_scalar or config.head_dim
  window = config.sliding_window or GEMMA2_DEFAULTS['sliding_window']
  return {
      'hidden_activation': _GELU,
      # transformers 5 takes whole numbers only.
      'query_pre_attn_scalar': int(scalar) if scalar == int(scalar) else scalar,
      **{
          theirs: getattr(config, ours) or None for theirs, ours in CAPS.items()
      },
      # A number is needed even where no layer slides.
      'sliding_window': window,
      'layer_types': [SLIDING if s else FULL for s in slides],
  }


_FAMILY_FIELDS: dict[str, Callable[[GemmaConfig], dict[str, Any]]] = {
    'gemma': _gemma_fields,
    'gemma2': _gemma2_fields,
}


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n')
