"""Digests of files: what is read is known to be what was written.

A folder that this package writes holds `NAME`, with the size and the SHA-256 of
the files beside it. JSON files of a run hold the digest of their own content as
the last entry. A file that does not fit its digest is damaged; no part of it is
used. A folder without `NAME`, of the hub say, has nothing to be compared with.

SHA-256 because processors have instructions for it: one thread hashed 1.5 GB a
second on x86-64 where BLAKE2b made 0.6. `hashlib` lets other threads run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import time
from typing import Any

from etils import epath

from ma_rlhf_jax import atomic_file

NAME = 'ma_rlhf_manifest.json'
_SEAL = 'sha256'
_SEAL_LENGTH = 64  # hex digits
_CHUNK = 2**22  # bytes
_THREADS = min(16, os.cpu_count() or 1)
# A file that is written twice within this time may keep its time stamp.
_CLOCK_STEP = 2.0  # seconds

Entries = dict[str, dict[str, Any]]


class DamagedError(ValueError):
  """A file is not as it was written; the message names it and what to do."""


def digest(content: Mapping[str, Any]) -> str:
  """SHA-256 (hex) of JSON values, the same before and after they are written.

  The order of keys counts.
  """
  text = json.dumps(content, separators=(',', ':'), allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> str:
  """The text of a JSON file that holds `content` and the digest of it."""
  whole = {**content, _SEAL: digest(content)}
  return json.dumps(whole, indent=2, allow_nan=False) + '\n'


def write_sealed(path: epath.PathLike, content: Mapping[str, Any]) -> None:
  """Writes `sealed(content)`, whole or not at all."""
  atomic_file.write_text(path, sealed(content))


def read_sealed(path: epath.PathLike) -> dict[str, Any]:
  """The content of a file that `sealed` made, or that an earlier version wrote.

  Files of versions that wrote no digest are taken as they are.

  Raises:
    FileNotFoundError: if there is no such file.
    DamagedError: if the content does not fit its digest or is no JSON object.
  """
  try:
    content = json.loads(epath.Path(path).read_bytes())
  except ValueError as error:
    raise DamagedError(f'{path} is damaged: it is no JSON ({error})') from error
  if not isinstance(content, dict):
    raise DamagedError(f'{path} is damaged: it holds no JSON object')
  if not content:
    return content
  name, found = content.popitem()
  # Whatever has become of its name, or of its digits, it is a digest.
  is_digest = isinstance(found, str) and len(found) == _SEAL_LENGTH
  if name != _SEAL and not is_digest:
    return content | {name: found}
  if name != _SEAL or digest(content) != found:
    raise DamagedError(
        f'{path} is damaged: its content does not fit its digest'
    )
  return content


def sha256(path: epath.PathLike) -> str:
  """SHA-256 (hex) of a file, as `sha256sum` gives it.

  A process reads a file once, unless it changes or is younger than 2 seconds.
  """
  path = epath.Path(path)
  if '://' in os.fspath(path):
    return _hashed(path)
  status = os.stat(path)
  if time.time() - status.st_mtime < _CLOCK_STEP:
    return _hashed(path)
  return _hashed_once(
      os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns
  )


@functools.lru_cache(maxsize=4096)
def _hashed_once(path: str, inode: int, size: int, changed: int) -> str:
  del inode, size, changed  # part of the key
  return _hashed(epath.Path(path))


def _hashed(path: epath.Path) -> str:
  total = hashlib.sha256()
  with path.open('rb') as file:
    while chunk := file.read(_CHUNK):
      total.update(chunk)
  return total.hexdigest()


def entries(folder: epath.PathLike, names: Iterable[str]) -> Entries:
  """Name -> {'bytes', 'sha256'} of files of a folder, several at a time."""
  folder, names = epath.Path(folder), sorted(names)

  def entry(name: str) -> dict[str, Any]:
    path = folder / name
    return {'bytes': path.stat().length, 'sha256': sha256(path)}

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(entry, names), strict=True))


def files_under(folder: epath.PathLike) -> list[str]:
  """Names of all files below a folder, relative to it, without `NAME`."""
  folder = epath.Path(folder)
  found = []
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      found += [f'{path.name}/{name}' for name in files_under(path)]
    else:
      found.append(path.name)
  return [name for name in found if name != NAME]


def write(folder: epath.PathLike, found: Entries | None = None) -> str:
  """Writes the manifest of a folder, after all that it speaks of.

  Args:
    folder: with the files; also gs://.
    found: their entries; None = all files, which are read.

  Returns:
    The digest of the manifest.
  """
  if found is None:
    found = entries(folder, files_under(folder))
  content = {'files': found}
  write_sealed(epath.Path(folder) / NAME, content)
  return digest(content)


def read(folder: epath.PathLike) -> Entries | None:
  """What the manifest of a folder says; None where there is none.

  Raises:
    DamagedError: if the manifest itself is damaged.
  """
  try:
    content = read_sealed(epath.Path(folder) / NAME)
  except FileNotFoundError:
    return None
  if not isinstance(content.get('files'), dict):
    raise DamagedError(
        f'{epath.Path(folder) / NAME} is damaged: it has no files'
    )
  return content['files']


def digest_of(folder: epath.PathLike) -> str | None:
  """The digest of a folder's manifest; None where there is none."""
  found = read(folder)
  return None if found is None else digest({'files': found})


def verify(
    folder: epath.PathLike,
    chosen: Callable[[str], bool] = lambda name: True,
    *,
    remedy: str = '',
) -> bool:
  """Compares the files of a folder with its manifest.

  Args:
    folder: also gs://.
    chosen: which of the files, by name.
    remedy: what the user can do; '' = the usual words.

  Returns:
    Whether there is a manifest.

  Raises:
    DamagedError: names the first file that is damaged.
  """
  remedy = remedy or _remedy(epath.Path(folder))
  try:
    wanted = read(folder)
    if wanted is None:
      return False
    _compare(epath.Path(folder), {n: wanted[n] for n in wanted if chosen(n)})
  except DamagedError as error:
    raise DamagedError(f'{error}; {remedy}') from error
  return True


def _compare(folder: epath.Path, wanted: Entries) -> None:
  for name, entry in wanted.items():
    path = folder / name
    if not path.exists():
      raise DamagedError(
          f'{path} is damaged: {NAME} lists it, and it is missing'
      )
    if (size := path.stat().length) != entry['bytes']:
      raise DamagedError(
          f'{path} is damaged: it has {size} bytes, {NAME} says '
          f'{entry["bytes"]}'
      )
  for name, found in entries(folder, wanted).items():
    if found['sha256'] != wanted[name]['sha256']:
      raise DamagedError(
          f'{folder / name} is damaged: its SHA-256 is not that of {NAME}'
      )


def _remedy(folder: epath.Path) -> str:
  """What to do about a damaged folder."""
  if (folder.parent / 'done.json').exists():  # the product of a stage
    return (
        f'run the train command of {folder.parent.parent} again, which makes '
        'the folder anew from the checkpoint'
    )
  return (
      'fetch, copy or export the folder again; where the file was changed on '
      f'purpose, remove {NAME} beside it'
  )


def check_digest(folder: epath.PathLike, wanted: str, *, remedy: str) -> None:
  """Raises DamagedError where a folder's manifest is missing or another one.

  Args:
    folder: also gs://.
    wanted: the `digest_of` it when it was written.
    remedy: what the user can do.
  """
  if digest_of(folder) != wanted:
    raise DamagedError(
        f'{folder} is damaged: it holds no {NAME}, or another one than '
        f'done.json of its stage names; {remedy}'
    )


def is_small(name: str) -> bool:
  """Whether a file of a model folder is none of its weights."""
  return not name.endswith('.safetensors')


@contextlib.contextmanager
def verifying(folder: epath.PathLike) -> Iterator[None]:
  """`verify` in the background, while the block reads the same files.

  So they come from the disk once, where memory holds them.

  Raises:
    DamagedError: when the block has ended; also in place of a ValueError or an
      OSError of the block.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    job = pool.submit(verify, folder)
    try:
      yield
    except (ValueError, OSError):
      job.result()  # the damage tells more than what it broke
      raise
    job.result()
