"""Hugging Face folders in: config.json and safetensors, local or fetched.

The tables are in `tensor_names`. Neither `transformers` nor PyTorch is needed.
"""

import atexit
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.models.presets import GemmaConfig, every_other
from ma_rlhf_jax.models.tensor_names import (
    CAPS,
    FULL,
    GEMMA2_DEFAULTS,
    INDEX,
    SINGLE,
    SIZES,
    SLIDING,
    WEIGHTS,
    Tensor,
    list_tensors,
    to_ours,
)
from ma_rlhf_jax.structs import Array, Params

# What we implement; the first is what a file means that leaves the field out.
# 'gelu' stands for the tanh form: the first releases said so by mistake.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    'hidden_act': ('gelu_pytorch_tanh', 'gelu', None),
    'hidden_activation': ('gelu_pytorch_tanh', 'gelu', None),
    'attention_bias': (False,),
    'tie_word_embeddings': (True,),
    'use_bidirectional_attention': (None, False),
}
# What is fetched of a repository: never code, never pickles.
_FETCHED = ('*.safetensors', '*.json', 'tokenizer.model')
_FLOATS = ('F64', 'F32', 'F16', 'BF16')
# In old files, but no parameters: the tied head, and a table of rotations.
_IGNORED = ('lm_head.weight', 'rotary_emb.inv_freq')


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
  theirs = _read_json(path)
  family = theirs.get('model_type')
  if family not in WEIGHTS:
    raise ValueError(
        f'{path}: model_type is {family!r}; implemented: '
        f'{", ".join(map(repr, WEIGHTS))}'
    )
  # transformers 4 writes rope_theta beside rope_scaling, 5 rope_parameters.
  rope = {'rope_theta': theirs.get('rope_theta', 10_000.0)}
  rope |= theirs.get('rope_scaling') or theirs.get('rope_parameters') or {}
  problems = [*_size_problems(theirs), *_kind_problems(theirs, rope)]
  if family == 'gemma2' and not problems:
    theirs = GEMMA2_DEFAULTS | theirs
    problems = list(_gemma2_problems(theirs))
  if problems:
    raise ValueError(f'{path} cannot be used:\n  ' + '\n  '.join(problems))
  return GemmaConfig(
      **{ours: theirs[name] for name, ours in SIZES.items()},
      family=family,
      rope_theta=float(rope['rope_theta']),
      norm_eps=theirs.get('rms_norm_eps', 1e-6),
      **(_gemma2_fields(theirs) if family == 'gemma2' else {}),
  )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(
        f'{path} is no JSON ({error}); fetch it again: it may be the page of '
        'an error, or a pointer of git lfs'
    ) from error
  if not isinstance(found, dict):
    raise ValueError(f'{path} must hold a JSON object; fetch it again')
  return found


def _layer_types(theirs: Mapping[str, Any]) -> list[str]:
  """Which layers slide; files from before the field say nothing."""
  if theirs.get('layer_types') is not None:
    return theirs['layer_types']
  slides = every_other(theirs['num_hidden_layers'])
  return [SLIDING if s else FULL for s in slides]


def _gemma2_problems(theirs: Mapping[str, Any]) -> Iterator[str]:
  for name in ('query_pre_attn_scalar', *CAPS, 'sliding_window'):
    value = theirs[name]
    if value is None and name != 'query_pre_attn_scalar':
      continue
    if isinstance(value, bool) or not isinstance(value, int | float):
      yield f'{name} is {value!r}; it must be a number'
    elif value <= 0:
      yield f'{name} is {value!r}; it must be above 0'
  types, layers = _layer_types(theirs), theirs['num_hidden_layers']
  if not isinstance(types, list) or len(types) != layers:
    yield f'layer_types is {types!r}; it must list {layers} layers'
  elif unknown := sorted(set(map(str, types)) - {SLIDING, FULL}):
    yield f'layer_types holds {unknown}; implemented: {SLIDING}, {FULL}'


def _gemma2_fields(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `GemmaConfig` that Gemma 2 has beyond Gemma 1."""
  slides = tuple(t == SLIDING for t in _layer_types(theirs))
  window = theirs['sliding_window'] or 0
  return {
      'query_pre_attn_scalar': theirs['query_pre_attn_scalar'],
      **{ours: theirs[name] or 0.0 for name, ours in CAPS.items()},
      'sliding_window': window if any(slides) else 0,
      'sliding_layers': slides if window and any(slides) else (),
  }


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
  with contextlib.ExitStack() as stack:
    found, wanted = _checked_tensors(folder, config, kind, stack)
    targets = traverse_util.flatten_dict(abstract_params(kind, config), sep='/')
    leaves = {}
    for path, target in targets.items():
      parts = [t for t in wanted if t.path == path]
      leaves[path] = _place(_read(found, parts, target), target.sharding)
  return traverse_util.unflatten_dict(leaves, sep='/')


def check_params(
    folder: str | os.PathLike[str], config: GemmaConfig, kind: str
) -> None:
  """Raises what `load_params` would, without reading a weight."""
  with contextlib.ExitStack() as stack:
    _checked_tensors(folder, config, kind, stack)


def _checked_tensors(
    folder: str | os.PathLike[str],
    config: GemmaConfig,
    kind: str,
    stack: contextlib.ExitStack,
) -> tuple[dict[str, Any], list[Tensor]]:
  """The open files by tensor name, and the tensors that make up the model."""
  found = _open_tensors(pathlib.Path(folder), stack)
  wanted = list_tensors(kind, config, **_their_names(kind, found))
  if problems := list(_tensor_problems(found, wanted)):
    raise ValueError(
        f'{folder} does not fit a {kind} of {config}:\n  '
        + '\n  '.join(problems)
    )
  return found, wanted


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
  if (folder / SINGLE).is_file():
    return [folder / SINGLE]
  if not (folder / INDEX).is_file():
    pickles = [
        p.name for e in ('bin', 'pt', 'pth') for p in folder.glob(f'*.{e}')
    ]
    raise FileNotFoundError(
        f'{folder} holds neither {SINGLE} nor {INDEX} (pickle files: '
        f'{sorted(pickles)}); a pickle runs the code in it when read, so only '
        'safetensors are: save the model once with safetensors'
    )
  names = set(json.loads((folder / INDEX).read_text())['weight_map'].values())
  outside = {name for name in names if name != pathlib.Path(name).name}
  absent = {name for name in names - outside if not (folder / name).is_file()}
  if outside or absent:
    raise ValueError(
        f'{folder / INDEX} must name files beside it; these are not bare file '
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
