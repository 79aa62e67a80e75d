"""Hugging Face folders in: found or fetched, checked, and streamed.

The tables are in `tensor_names`. Neither `transformers` nor PyTorch is needed.
"""

import atexit
import contextlib
import errno
import functools
import os
import pathlib
import sys

from etils import epath
from flax import traverse_util

from ma_rlhf_jax import interrupts, manifest
from ma_rlhf_jax.data import files
from ma_rlhf_jax.models import config_json, streaming, weight_files
from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.models.tensor_names import FETCHED, Tensor, list_tensors
from ma_rlhf_jax.structs import Params

# What a folder of each kind holds.
_KINDS = {
    'policy': 'policy (CausalLM)',
    'scalar': 'reward model or critic (SequenceClassification)',
}


def resolve(name: str) -> pathlib.Path:
  """The local folder of a model: a path, a gs:// path or a hub id.

  What comes from a bucket lies in a temporary folder until the process ends,
  what comes from the hub in its cache (alone asked under HF_HUB_OFFLINE=1).
  Where a folder has a manifest its files are compared with it, weights of a
  local folder when they are loaded.

  Raises:
    FileNotFoundError: if there is no such folder, or the hub gives none.
    OSError: if what is fetched does not fit on the disk.
    DamagedError: if a file does not fit the manifest of the folder.
  """
  folder = _fetch(name) if '://' in name else _local(name)
  manifest.verify(folder, manifest.is_small)
  return folder


def _local(name: str) -> pathlib.Path:
  """The folder of that name, or of the hub's cache."""
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return path
  if path.exists() or name.startswith(('/', '.', '~')) or name.count('/') != 1:
    raise FileNotFoundError(
        f'{name!r} is not a folder; give one that exists and holds '
        'config.json, or a hub id of the form user/name'
    )
  return _download(name)


def _download(name: str) -> pathlib.Path:
  """A snapshot of a hub repository, in the cache of the hub's library."""
  import huggingface_hub
  from huggingface_hub import errors

  try:
    return pathlib.Path(
        huggingface_hub.snapshot_download(name, allow_patterns=list(FETCHED))
    )
  except (
      errors.HFValidationError,
      errors.HTTPError,
      errors.LocalEntryNotFoundError,
  ) as error:
    reason = _hub_reason(name, error)
    raise FileNotFoundError(f'{name!r} {reason}') from error
  except OSError as error:
    raise _full_disk(error, name, 'HF_HOME') from error


def _hub_reason(name: str, error: Exception) -> str:
  """What is wrong with a hub id, and what to do."""
  from huggingface_hub import errors

  first_line = str(error).partition('\n')[0]
  reasons = {  # the first that fits
      errors.GatedRepoError: (
          'is gated on the hub; accept its terms at '
          f'https://huggingface.co/{name}, then set HF_TOKEN'
      ),
      errors.RepositoryNotFoundError: (
          'is neither a folder here nor a repository on the hub; check the '
          'spelling, and set HF_TOKEN if it is a private one'
      ),
      errors.LocalEntryNotFoundError: (
          'is neither a folder here nor in the cache, and the hub was not '
          'reached; check the connection and HF_HUB_OFFLINE'
      ),
      Exception: f'could not be fetched from the hub: {first_line}',
  }
  return next(text for kind, text in reasons.items() if isinstance(error, kind))


def _full_disk(error: OSError, name: str, variable: str) -> OSError:
  """The error, with what to do where the disk is full."""
  if error.errno != errno.ENOSPC:
    return error
  return OSError(
      errno.ENOSPC,
      f'no space left to fetch {name!r}; free some, or point {variable} to a '
      'larger disk',
  )


@functools.cache
def _fetch(name: str) -> pathlib.Path:
  """A temporary copy of a folder in a bucket."""
  source = epath.Path(name)
  if not (source / 'config.json').exists():
    raise FileNotFoundError(
        f'{name!r} holds no config.json; name the folder of a whole export'
    )
  stack = contextlib.ExitStack()
  local = pathlib.Path(
      stack.enter_context(interrupts.temporary_folder(prefix='ma_rlhf_jax-'))
  )
  atexit.register(stack.close)
  try:
    for pattern in FETCHED:
      for file in source.glob(pattern):
        file.copy(local / file.name)
  except OSError as error:
    stack.close()
    raise _full_disk(error, name, 'TMPDIR') from error
  try:
    manifest.verify(local)
  except manifest.DamagedError as error:
    raise manifest.DamagedError(
        f'{name}, as it was fetched: {error}'
    ) from error
  return local


def refuse_adapter(folder: str | os.PathLike[str]) -> None:
  """Raises ValueError where a folder holds an adapter in place of a model."""
  adapter = pathlib.Path(folder) / 'adapter_config.json'
  if adapter.is_file() and not adapter.with_name('config.json').is_file():
    base = files.read_json(adapter).get('base_model_name_or_path')
    raise ValueError(
        f'{folder} is a LoRA adapter, not a model; merge it into its base '
        f'model ({base}) and name the folder of the result'
    )


def read_shape(folder: str | os.PathLike[str]) -> GemmaConfig:
  """The shape that the config.json of a folder describes, in our dtypes.

  Raises:
    FileNotFoundError: if there is no config.json.
    ValueError: if it describes what we do not implement, with every reason, or
      if the folder is an adapter.
  """
  path = pathlib.Path(folder) / 'config.json'
  if not path.is_file():
    refuse_adapter(folder)
    raise FileNotFoundError(f'{path} is missing; it gives the shape of a model')
  theirs = files.read_json(path)
  try:
    shape = config_json.read_fields(theirs)
    if note := config_json.note(theirs):
      _note(f'note: {path}: {note}')
    return shape
  except ValueError as error:
    reasons = str(error).replace('\n', '\n  ')
    raise ValueError(f'{path} cannot be used:\n  {reasons}') from error


@functools.cache
def _note(text: str) -> None:
  """Says `text` once, however often a folder is read."""
  print(text, file=sys.stderr, flush=True)


def check_params(
    folder: str | os.PathLike[str], config: GemmaConfig, kind: str
) -> None:
  """Raises what `load_params` would, without reading a weight."""
  with contextlib.ExitStack() as stack:
    _checked_tensors(folder, config, kind, stack)


def load_params(
    folder: str | os.PathLike[str], config: GemmaConfig, kind: str = 'policy'
) -> Params:
  """The parameters of a folder, in the dtypes of `config` and their shardings.

  Beyond the arrays themselves it needs little memory, see `streaming`.

  Args:
    folder: local; holds model.safetensors, or its index and shards.
    config: the shape, without adapters; names, shapes and types of the tensors
      are checked against it before any is read.
    kind: 'policy' reads GemmaForCausalLM, 'scalar'
      GemmaForSequenceClassification with one label or a reward model in the
      authors' names (`rwtransformer.*`, `v_head.weight`).

  Raises:
    FileNotFoundError: if there are no safetensors.
    ValueError: if a file is broken, if tensors do not fit (lists all of them),
      if weights are nan or infinite, or
      become so in the dtypes of `config`.
    DamagedError: if a file does not fit the manifest of the folder.
  """
  if config.lora is not None:
    raise ValueError(
        f'{folder} is read without adapters; load it by a config with '
        'lora=None and give it adapters by lora.add_adapters'
    )
  targets = traverse_util.flatten_dict(abstract_params(kind, config), sep='/')
  with manifest.verifying(folder), contextlib.ExitStack() as stack:
    found, wanted = _checked_tensors(folder, config, kind, stack)
    dtypes = {path: target.dtype for path, target in targets.items()}
    read, leaves = weight_files.Reader(found, wanted, dtypes), {}
    for path, target in targets.items():
      parts = [t for t in wanted if t.path == path]
      leaves[path] = streaming.stream(read, parts, target)
      read.check()
  return traverse_util.unflatten_dict(leaves, sep='/')


def _checked_tensors(
    folder: str | os.PathLike[str],
    config: GemmaConfig,
    kind: str,
    stack: contextlib.ExitStack,
) -> tuple[dict[str, weight_files.Stored], list[Tensor]]:
  """The stored tensors by name, and those that make up the model."""
  found = weight_files.open_folder(pathlib.Path(folder), stack)
  names = weight_files.their_names(kind, found)
  wanted = list_tensors(kind, config, **names)
  if problems := list(weight_files.tensor_problems(found, wanted)):
    raise ValueError(
        f'{folder} does not fit a {_KINDS[kind]} of the shape that its '
        'config.json gives; download it again, or name another folder:\n  '
        + '\n  '.join(problems)
    )
  return found, wanted
