"""Hugging Face folders in and out: config.json, safetensors, tokenizer.

`WEIGHTS` is the one table between our parameters and their tensors, and `SIZES`
the one between the shapes; reading and writing both go through them. Neither
`transformers` nor PyTorch is needed, except to write a tokenizer.
"""

import atexit
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath
from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.structs import Array, Params

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


class Weight(NamedTuple):
  """What one of our parameters is called and how it lies in their files.

  Attributes:
    name: their tensor; {} stands for the layer, which is our first axis.
    inputs: how many of our axes (without the layer) are summed over. They hold
      a matrix [outputs, inputs], we [*inputs, *outputs]; 0 if both are alike.
  """

  name: str
  inputs: int


# In a scalar model these lie below `backbone`, beside `head`.
WEIGHTS = {
    'embedding': Weight('embed_tokens.weight', 0),
    'layers/attention_norm/scale': Weight(
        'layers.{}.input_layernorm.weight', 0
    ),
    'layers/attention/query': Weight('layers.{}.self_attn.q_proj.weight', 1),
    'layers/attention/key': Weight('layers.{}.self_attn.k_proj.weight', 1),
    'layers/attention/value': Weight('layers.{}.self_attn.v_proj.weight', 1),
    'layers/attention/out': Weight('layers.{}.self_attn.o_proj.weight', 2),
    'layers/mlp_norm/scale': Weight(
        'layers.{}.post_attention_layernorm.weight', 0
    ),
    'layers/mlp/gate': Weight('layers.{}.mlp.gate_proj.weight', 1),
    'layers/mlp/up': Weight('layers.{}.mlp.up_proj.weight', 1),
    'layers/mlp/down': Weight('layers.{}.mlp.down_proj.weight', 1),
    'final_norm/scale': Weight('norm.weight', 0),
}
# Their size -> ours.
SIZES = {
    'vocab_size': 'vocab_size',
    'num_hidden_layers': 'num_layers',
    'hidden_size': 'embed_dim',
    'intermediate_size': 'mlp_dim',
    'num_attention_heads': 'num_heads',
    'num_key_value_heads': 'num_kv_heads',
    'head_dim': 'head_dim',
}
# What we implement; the first is what a file means that leaves the field out.
# 'gelu' stands for the tanh form: the first releases said so by mistake.
_ALLOWED = {
    'hidden_act': ('gelu_pytorch_tanh', 'gelu', None),
    'hidden_activation': ('gelu_pytorch_tanh', 'gelu', None),
    'attention_bias': (False,),
    'tie_word_embeddings': (True,),
    'use_bidirectional_attention': (None, False),
}
_ARCHITECTURES = {
    'policy': 'GemmaForCausalLM',
    'scalar': 'GemmaForSequenceClassification',
}
# What is fetched of a repository: never code, never pickles.
_FETCHED = ('*.safetensors', '*.json', 'tokenizer.model')
_SINGLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_FLOATS = ('F64', 'F32', 'F16', 'BF16')
# In old files, but no parameters: the tied head, and a table of rotations.
_IGNORED = ('lm_head.weight', 'rotary_emb.inv_freq')
_MAX_SHARD_BYTES = 5 * 10**9
_CONTEXT = 8192  # tokens Gemma 1 was trained on; nothing here depends on it


class Tensor(NamedTuple):
  """One tensor of theirs, and its place in our parameters.

  Attributes:
    name: in the file.
    shape: in the file.
    path: of our parameter, its parts joined by '/'.
    layer: index on our first axis, or None.
    inputs: as in `Weight`.
  """

  name: str
  shape: tuple[int, ...]
  path: str
  layer: int | None
  inputs: int


def to_theirs(x: Array, inputs: int) -> Array:
  """Our layout to theirs, of one layer."""
  if not inputs:
    return x
  return x.reshape(math.prod(x.shape[:inputs]), -1).T


def to_ours(x: Array, inputs: int, shape: tuple[int, ...]) -> Array:
  """Their layout to ours, of one layer; the inverse of `to_theirs`."""
  return (x.T if inputs else x).reshape(shape)


def list_tensors(
    kind: str,
    config: GemmaConfig,
    *,
    prefix: str = 'model.',
    head: str = 'score.weight',
) -> list[Tensor]:
  """Their tensors of a model, in the order in which they are written.

  Args:
    kind: 'policy' or 'scalar'.
    config: the shape.
    prefix: what their names of the backbone start with.
    head: their name of the scalar head.
  """
  shapes = {path: x.shape for path, x in _targets(kind, config).items()}
  root = 'backbone/' if kind == 'scalar' else ''

  def tensor(path: str, weight: Weight, layer: int | None) -> Tensor:
    shape = shapes[path] if layer is None else shapes[path][1:]
    if i := weight.inputs:
      shape = (math.prod(shape[i:]), math.prod(shape[:i]))
    return Tensor(weight.name.format(layer), shape, path, layer, i)

  single, layers = [], [[] for _ in range(config.num_layers)]
  for path, (name, inputs) in WEIGHTS.items():
    weight = Weight(prefix + name, inputs)
    if '{}' not in name:
      single.append(tensor(root + path, weight, None))
      continue
    for index, layer in enumerate(layers):
      layer.append(tensor(root + path, weight, index))
  if kind == 'scalar':
    single.append(tensor('head', Weight(head, 1), None))
  return single + [t for layer in layers for t in layer]


def _targets(kind: str, config: GemmaConfig) -> dict[str, jax.ShapeDtypeStruct]:
  return traverse_util.flatten_dict(abstract_params(kind, config), sep='/')


def resolve(name: str) -> pathlib.Path:
  """The local folder of a model: a path, a gs:// path or a hub id.

  What comes from a bucket lies in a temporary folder until the process ends,
  what comes from the hub in its cache (alone asked under HF_HUB_OFFLINE=1).

  Raises:
    FileNotFoundError: if there is no such folder, or the hub gives none.
  """
  if '://' in name:
    return _fetch(name)
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return path
  if path.exists() or name.startswith(('/', '.', '~')) or name.count('/') != 1:
    raise FileNotFoundError(
        f'{name!r} is not a folder; give one that exists and holds '
        'config.json, or a hub id of the form user/name'
    )
  import huggingface_hub
  from huggingface_hub import errors

  try:
    return pathlib.Path(
        huggingface_hub.snapshot_download(name, allow_patterns=list(_FETCHED))
    )
  except (
      errors.HFValidationError,
      errors.HfHubHTTPError,
      errors.LocalEntryNotFoundError,
  ) as error:
    raise FileNotFoundError(
        f'{name!r} is neither a folder nor a hub repository that can be read; '
        'check the name, the connection and HF_HUB_OFFLINE, and for a gated '
        'model accept its terms and set HF_TOKEN'
    ) from error


@functools.cache
def _fetch(name: str) -> pathlib.Path:
  """A temporary copy of a folder in a bucket."""
  source = epath.Path(name)
  if not (source / 'config.json').exists():
    raise FileNotFoundError(
        f'{name!r} holds no config.json; name the folder of a whole export'
    )
  local = pathlib.Path(tempfile.mkdtemp(prefix='ma_rlhf_jax-'))
  atexit.register(shutil.rmtree, local, ignore_errors=True)
  for pattern in _FETCHED:
    for file in source.glob(pattern):
      file.copy(local / file.name)
  return local


def read_shape(folder: str | os.PathLike[str]) -> GemmaConfig:
  """The shape that the config.json of a folder describes, in our dtypes.

  Raises:
    FileNotFoundError: if there is no config.json.
    ValueError: if it describes what we do not implement; gives every reason.
  """
  path = pathlib.Path(folder) / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing; it gives the shape of a model')
  theirs = json.loads(path.read_text())
  if theirs.get('model_type') != 'gemma':
    raise ValueError(
        f'{path}: model_type is {theirs.get("model_type")!r}; only Gemma 1, '
        "'gemma', is implemented"
    )
  # transformers 4 writes rope_theta beside rope_scaling, 5 rope_parameters.
  rope = {'rope_theta': theirs.get('rope_theta', 10_000.0)}
  rope |= theirs.get('rope_scaling') or theirs.get('rope_parameters') or {}
  if problems := [*_size_problems(theirs), *_kind_problems(theirs, rope)]:
    raise ValueError(f'{path} cannot be used:\n  ' + '\n  '.join(problems))
  return GemmaConfig(
      **{ours: theirs[name] for name, ours in SIZES.items()},
      rope_theta=float(rope['rope_theta']),
      norm_eps=theirs.get('rms_norm_eps', 1e-6),
  )


def _size_problems(theirs: Mapping[str, Any]) -> Iterator[str]:
  sizes = {name: theirs.get(name) for name in SIZES}
  bad = {n: v for n, v in sizes.items() if type(v) is not int or v < 1}
  for name, value in bad.items():
    yield f'{name} is {value!r}; it must be a positive integer'
  if not bad and theirs['num_attention_heads'] % theirs['num_key_value_heads']:
    yield (
        f'num_key_value_heads={theirs["num_key_value_heads"]} does not divide '
        f'num_attention_heads={theirs["num_attention_heads"]}'
    )
  if not bad and theirs['head_dim'] % 2:
    yield f'head_dim={theirs["head_dim"]} is odd; rotation needs halves'


def _kind_problems(
    theirs: Mapping[str, Any], rope: Mapping[str, Any]
) -> Iterator[str]:
  for name, allowed in _ALLOWED.items():
    if (value := theirs.get(name, allowed[0])) not in allowed:
      yield f'{name} is {value!r}; implemented: {allowed}'
  kind = rope.get('rope_type', rope.get('type', 'default'))
  extra = sorted(set(rope) - {'rope_theta', 'rope_type', 'type'})
  if kind != 'default' or extra:
    yield (
        f'rotary positions are of type {kind!r} with {extra}; implemented: '
        "'default' with rope_theta"
    )


def load_params(
    folder: str | os.PathLike[str], config: GemmaConfig, kind: str = 'policy'
) -> Params:
  """The parameters of a folder, in `config.param_dtype` and their shardings.

  Args:
    folder: local; holds model.safetensors, or its index and shards.
    config: the shape; names and shapes are checked against it before reading.
    kind: 'policy' reads GemmaForCausalLM, 'scalar'
      GemmaForSequenceClassification with one label or a reward model in the
      authors' names (`rwtransformer.*`, `v_head.weight`).

  Raises:
    FileNotFoundError: if there are no safetensors.
    ValueError: if a file is broken, or tensors do not fit; lists all of them.
  """
  folder = pathlib.Path(folder)
  with contextlib.ExitStack() as stack:
    found = _open_tensors(folder, stack)
    wanted = list_tensors(kind, config, **_their_names(kind, found))
    if problems := list(_tensor_problems(found, wanted)):
      raise ValueError(
          f'{folder} does not fit a {kind} of {config}:\n  '
          + '\n  '.join(problems)
      )
    leaves = {}
    for path, target in _targets(kind, config).items():
      parts = [t for t in wanted if t.path == path]
      leaves[path] = _place(_read(found, parts, target), target.sharding)
  return traverse_util.unflatten_dict(leaves, sep='/')


def _open_tensors(
    folder: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, Any]:
  """Name -> open file, for every tensor of the folder."""
  found = {}
  for path in _weight_files(folder):
    try:
      file = stack.enter_context(safetensors.safe_open(path, 'numpy'))
    except safetensors.SafetensorError as error:
      raise ValueError(
          f'{path} ({path.stat().st_size} bytes) is not a whole safetensors '
          f'file; fetch it again: {error}'
      ) from error
    found |= {name: file for name in file.keys()}
  return found


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  if (folder / _SINGLE).is_file():
    return [folder / _SINGLE]
  if not (folder / _INDEX).is_file():
    pickles = [
        p.name for e in ('bin', 'pt', 'pth') for p in folder.glob(f'*.{e}')
    ]
    raise FileNotFoundError(
        f'{folder} holds neither {_SINGLE} nor {_INDEX} (pickle files: '
        f'{sorted(pickles)}); a pickle runs the code in it when read, so only '
        'safetensors are: save the model once with safetensors'
    )
  names = set(json.loads((folder / _INDEX).read_text())['weight_map'].values())
  outside = {name for name in names if name != pathlib.Path(name).name}
  absent = {name for name in names - outside if not (folder / name).is_file()}
  if outside or absent:
    raise ValueError(
        f'{folder / _INDEX} must name files beside it; these are not bare file '
        f'names: {sorted(outside)}; these are missing: {sorted(absent)}'
    )
  return [folder / name for name in sorted(names)]


def _their_names(kind: str, found: Mapping[str, Any]) -> dict[str, str]:
  """Which of the names in use for reward models a folder has."""
  names = {}
  if kind == 'scalar' and 'v_head.weight' in found:
    names['head'] = 'v_head.weight'
  if kind == 'scalar' and any(n.startswith('rwtransformer.') for n in found):
    names['prefix'] = 'rwtransformer.'
  return names


def _tensor_problems(
    found: Mapping[str, Any], wanted: Sequence[Tensor]
) -> Iterator[str]:
  for tensor in wanted:
    if tensor.name not in found:
      yield f'{tensor.name} is missing; needs shape {list(tensor.shape)}'
      continue
    header = found[tensor.name].get_slice(tensor.name)
    if (shape := tuple(header.get_shape())) != tensor.shape:
      yield (
          f'{tensor.name} has shape {list(shape)}; needs {list(tensor.shape)}'
      )
    if (dtype := header.get_dtype()) not in _FLOATS:
      yield f'{tensor.name} is of type {dtype}; needs one of {_FLOATS}'
  for name in sorted(set(found) - {tensor.name for tensor in wanted}):
    if not name.endswith(_IGNORED):
      yield f'{name} is not part of this model'


def _read(
    found: Mapping[str, Any],
    parts: Sequence[Tensor],
    target: jax.ShapeDtypeStruct,
) -> np.ndarray:
  """One parameter on the host, filled in place, one layer at a time."""
  out = np.empty(target.shape, target.dtype)
  for tensor in parts:
    where = ... if tensor.layer is None else tensor.layer
    theirs = found[tensor.name].get_tensor(tensor.name)
    out[where] = to_ours(theirs, tensor.inputs, out[where].shape)
  return out


def _place(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> Array:
  if sharding is None:
    return jnp.asarray(host)
  return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


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
    params: the parameters, on any shardings.
    config: their shape.
    kind: 'policy' or 'scalar'.
    tokenizer: written beside them; gives the special ids.
    dtype: of the tensors; None keeps that of the parameters.
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
    leaves = traverse_util.flatten_dict(params, sep='/')
    tensors = list_tensors(kind, config)
    _write_tensors(draft, leaves, tensors, dtype, max_shard_bytes)
    if jax.process_index() == 0:
      _write_tokenizer(draft, tokenizer)
      written = str(jnp.dtype(dtype or leaves[tensors[0].path].dtype))
      _write_configs(draft, config, kind, tokenizer, written)
      (_rename if local else _upload)(draft, target)


def _write_tensors(
    draft: pathlib.Path,
    leaves: Mapping[str, Array],
    tensors: Sequence[Tensor],
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
    name = _SINGLE if len(shards) == 1 else name
    weight_map |= {tensor.name: name for tensor in shard}
    host = {t.name: _to_host(leaves[t.path], t, dtype) for t in shard}
    if jax.process_index() == 0:
      save_file(host, draft / name, metadata={'format': 'pt'})
  if len(shards) > 1:
    total = {'total_size': sum(map(size, tensors))}
    _write_json(draft / _INDEX, {'metadata': total, 'weight_map': weight_map})


def _to_host(leaf: Array, tensor: Tensor, dtype: str | None) -> np.ndarray:
  ours = leaf if tensor.layer is None else leaf[tensor.layer]
  if isinstance(ours, jax.Array) and not ours.is_fully_addressable:
    ours = multihost_utils.process_allgather(ours, tiled=True)
  theirs = to_theirs(np.asarray(ours), tensor.inputs)
  return np.ascontiguousarray(theirs, dtype and jnp.dtype(dtype))


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
      'architectures': [_ARCHITECTURES[kind]],
      'model_type': 'gemma',
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
  if kind == 'scalar':
    shape |= {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
  else:
    _write_json(draft / 'generation_config.json', shared)
  _write_json(draft / 'config.json', {**shape, **shared})


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
