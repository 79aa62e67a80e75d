"""Safetensors of a folder: opened, checked by name, shape and type, and read.

Nothing here allocates a model. The files come from others, so what they say is
checked before it is believed: names in an index stay in the folder, a header
has a bounded size, and every tensor lies where the index says.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import pathlib
import re
from reprlib import repr as shown  # of what may be anything, shortened
import struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from ma_rlhf_jax.data import files
from ma_rlhf_jax.models.tensor_names import INDEX, SINGLE, Tensor

_MAX_HEADER_BYTES = 16 * 2**20
_MAX_TENSORS = 10_000  # Gemma 2 27B has 508
_BARE_NAME = re.compile(r'[A-Za-z0-9._-]{1,200}\.safetensors')
_FLOATS = ('F64', 'F32', 'F16', 'BF16')
_PICKLES = ('bin', 'pt', 'pth', 'pkl', 'ckpt')
# In files of before the head was tied: the embedding once more.
_OLD_HEAD = 'lm_head.weight'
# In old files, but no parameters: a table of rotations.
_IGNORED = ('rotary_emb.inv_freq',)


class Stored(NamedTuple):
  """A tensor in an open file.

  Attributes:
    path: of the file.
    data: its slice; `data[rows, columns]` reads no more than those.
  """

  path: pathlib.Path
  data: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.data.get_shape())

  @property
  def dtype(self) -> str:
    """As safetensors calls it: 'BF16', 'I8', ..."""
    return self.data.get_dtype()


def open_folder(
    folder: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, Stored]:
  """Name -> tensor, of every tensor in a folder.

  Args:
    folder: local; holds model.safetensors, or its index and shards.
    stack: closes the files.

  Raises:
    FileNotFoundError: if there are no safetensors.
    ValueError: if a file is not what it should be, or the index is wrong.
  """
  weight_map = _read_index(folder)
  names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
  found, problems = {}, []
  for path in (folder / name for name in names):
    file = stack.enter_context(_open(path))
    for name in file.keys():
      if name in found:
        problems.append(
            f'{name} is in {found[name].path.name} and in {path.name}'
        )
      found[name] = Stored(path, file.get_slice(name))
    _check_count(path, len(found))
  if weight_map is not None:
    problems += _index_problems(weight_map, found)
  if problems:
    raise ValueError(
        f'{folder / INDEX} does not fit the files beside it; download all of '
        'them again, from one revision:\n  ' + '\n  '.join(problems)
    )
  return found


def _read_index(folder: pathlib.Path) -> dict[str, str] | None:
  """Tensor -> file, as the index says; None where there is one file."""
  if (folder / SINGLE).is_file():
    return None
  index = folder / INDEX
  if not index.is_file():
    raise FileNotFoundError(
        f'{folder} holds neither {SINGLE} nor {INDEX}'
        + _without_safetensors(folder)
    )
  weight_map = files.read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(
        f'{index}: weight_map is {shown(weight_map)}; it must give the file of '
        'each tensor, so download the index again'
    )
  names = set(map(str, weight_map.values()))
  outside = {name for name in names if not _BARE_NAME.fullmatch(name)}
  absent = {n for n in names - outside if not (folder / n).is_file()}
  if outside or absent:
    raise ValueError(
        f'{index} must name files beside it; these are no bare names of '
        f'safetensors: {shown(sorted(outside))}; these are missing, so '
        f'download them again: {sorted(absent)}'
    )
  return weight_map


def _without_safetensors(folder: pathlib.Path) -> str:
  """Why a folder may have none, and what to do."""
  if (folder / 'adapter_model.safetensors').is_file():
    return '; it is a LoRA adapter, so merge it into its base model first'
  pickles = [p.name for e in _PICKLES for p in folder.glob(f'*.{e}')]
  if not pickles:
    return '; name the folder of a whole model'
  return (
      f', only pickles ({", ".join(sorted(pickles)[:5])}); a pickle runs the '
      'code in it when it is read, so save the model once with safetensors'
  )


def _open(path: pathlib.Path) -> Any:
  """The open file; raises where it is something else, or not whole."""
  if what := files.foreign(path):
    raise ValueError(f'{path} {what}')
  size = path.stat().st_size
  with path.open('rb') as file:
    header = struct.unpack('<Q', file.read(8).ljust(8, b'\0'))[0]
  if not 0 < header <= min(_MAX_HEADER_BYTES, size - 8):
    raise ValueError(
        f'{path} ({size} bytes) is not a whole safetensors file: it speaks of '
        f'a header of {header} bytes (at most {_MAX_HEADER_BYTES} are read); '
        'download it again'
    )
  try:
    return safetensors.safe_open(path, 'numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
        f'{path} ({size} bytes) is not a whole safetensors file'
        f'{_wanted_size(path, header)}; download it again: {error}'
    ) from error


def _wanted_size(path: pathlib.Path, header: int) -> str:
  """What the header says of the size, where it can be read."""
  with path.open('rb') as file, contextlib.suppress(
      ValueError, RecursionError, AttributeError, KeyError, TypeError
  ):
    file.seek(8)
    tensors = json.loads(file.read(header))
    tensors.pop('__metadata__', None)
    end = max(x['data_offsets'][1] for x in tensors.values())
    return f', which has {8 + header + end}'
  return ''


def _check_count(path: pathlib.Path, count: int) -> None:
  if count > _MAX_TENSORS:
    raise ValueError(
        f'{path}: its header brings the tensors of the folder to {count}; at '
        f'most {_MAX_TENSORS} are read, so this is not a Gemma'
    )


def _index_problems(
    weight_map: Mapping[str, str], found: Mapping[str, Stored]
) -> Iterator[str]:
  for name, file in weight_map.items():
    if name not in found:
      yield f'{name} is missing from {file}, where the index has it'
    elif (there := found[name].path.name) != file:
      yield f'{name} is in {there}; the index has it in {file}'
  for name in sorted(found.keys() - weight_map.keys()):
    yield f'{name} is in {found[name].path.name}; the index lacks it'


def their_names(kind: str, found: Mapping[str, Stored]) -> dict[str, str]:
  """Which of the names in use for reward models a folder has."""
  names = {}
  if kind == 'scalar' and 'v_head.weight' in found:
    names['head'] = 'v_head.weight'
  if kind == 'scalar' and any(n.startswith('rwtransformer.') for n in found):
    names['prefix'] = 'rwtransformer.'
  return names


def _twin(wanted: Sequence[Tensor]) -> dict[str, str]:
  """The embedding -> its copy in old files; a scalar model reads no head."""
  return {t.name: _OLD_HEAD for t in wanted if t.path == 'embedding'}


def _alike(one: Stored, other: Stored) -> bool:
  return (one.shape, one.dtype) == (other.shape, other.dtype)


def tensor_problems(
    found: Mapping[str, Stored], wanted: Sequence[Tensor]
) -> Iterator[str]:
  """What keeps the tensors of a folder from being those of a model."""
  for tensor in wanted:
    if tensor.name in found:
      yield from _mismatches(tensor, found[tensor.name])
    else:
      yield f'{tensor.name} is missing; needs shape {list(tensor.shape)}'
  for name, copy in _twin(wanted).items():
    if name in found and copy in found and not _alike(found[name], found[copy]):
      yield _untied(found[copy])
  known = {tensor.name for tensor in wanted} | {_OLD_HEAD}
  for name in sorted(found.keys() - known):
    if not name.endswith(_IGNORED):
      yield f'{name} ({found[name].path.name}) is not part of this model'


def _mismatches(tensor: Tensor, stored: Stored) -> Iterator[str]:
  name = f'{tensor.name} ({stored.path.name})'
  if stored.shape != tensor.shape:
    what = f'{name} has shape {list(stored.shape)}'
    what += f'; needs {list(tensor.shape)}'
    if tensor.path.endswith('embedding'):
      what += ', as vocab_size and hidden_size of config.json say'
    yield what
  if stored.dtype not in _FLOATS:
    yield f'{name} is of type {stored.dtype}; needs one of {_FLOATS}'


def _untied(stored: Stored) -> str:
  return (
      f'{stored.path}: {_OLD_HEAD} differs from the embedding; a head of its '
      'own is not implemented (tie_word_embeddings must be true)'
  )


def _limit(stored: np.dtype, target: np.dtype) -> float | None:
  """From where on a value is cast to infinity; None = none is."""
  theirs, ours = ml_dtypes.finfo(stored), ml_dtypes.finfo(target)
  if float(theirs.max) <= float(ours.max):
    return None
  # Halfway from the largest one to the next power of two.
  eps = float(ours.eps)
  return float(ours.max) * ((2 - eps / 2) / (2 - eps))


class Reader:
  """Reads parts of tensors, and remembers what is wrong with the values."""

  def __init__(
      self,
      found: Mapping[str, Stored],
      wanted: Sequence[Tensor],
      dtypes: Mapping[str, np.dtype],
  ) -> None:
    """Of an open folder, for the tensors of a model.

    Args:
      found: the tensors of the folder by name.
      wanted: the tensors of the model.
      dtypes: path of a parameter -> what its values will be cast to.
    """
    self._found = found
    self._dtypes = {t.name: dtypes[t.path] for t in wanted}
    self._over = Counter()
    self._twin = _twin(wanted) if _OLD_HEAD in found else {}
    self._read, self._bad = Counter(), Counter()
    self._untied = False

  def __call__(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
    """The part `where` of a tensor, as it lies in the file."""
    part = self._found[name].data[where]
    self._read[name] += part.size
    bad = part.size - np.count_nonzero(np.isfinite(part))
    self._bad[name] += bad
    if (limit := _limit(part.dtype, self._dtypes[name])) is not None:
      self._over[name] += np.count_nonzero(np.abs(part) >= limit) - bad
    if name in self._twin:
      copy = self._found[self._twin[name]].data[where]
      as_bytes = lambda x: np.ascontiguousarray(x).view(np.uint8)
      same = np.array_equal(as_bytes(part), as_bytes(copy))
      self._untied = self._untied or not same
    return part

  def check(self) -> None:
    """Raises if anything read so far cannot be used.

    Raises:
      ValueError: with file, tensor and number of values that are no numbers.
    """
    problems = [
        f'{self._found[name].path}: {bad} of {self._read[name]} values of '
        f'{name} are nan or infinite; download the file again, or take '
        'another checkpoint of that model'
        for name, bad in self._bad.items()
        if bad
    ]
    problems += [
        f'{self._found[name].path}: {over} of {self._read[name]} values of '
        f'{name} are beyond the largest {self._dtypes[name]}; take another '
        'checkpoint of that model, or a wider dtype'
        for name, over in self._over.items()
        if over
    ]
    if self._untied:
      problems.append(_untied(self._found[_OLD_HEAD]))
    if problems:
      raise ValueError('\n  '.join(problems))
