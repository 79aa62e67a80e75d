"""Files that appear whole or not at all, whenever the process is killed.

A local file is written beside its place, brought to disk, and renamed:

  <folder>/.<name>.part    while it is written; what a kill leaves of it, the
                           next write of that file replaces
  <folder>/<name>          whole, or as it was before

An object of a bucket appears by itself when it is whole. One process writes a
file at a time.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
from typing import Any, BinaryIO

from etils import epath


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """A file open for writing, which then takes the place of `path`.

  Args:
    path: local; its folder must exist. A link is followed.

  Raises:
    OSError: if it cannot be written; `path` is then as it was before.
  """
  target = pathlib.Path(os.path.realpath(path))
  if target.exists() and not target.is_file():  # /dev/stdout, a pipe
    with target.open('wb') as file:
      yield file
    return
  part = target.with_name(f'.{target.name}.part')
  try:
    with part.open('wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    part.replace(target)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def write_bytes(path: epath.PathLike, content: bytes) -> None:
  """Writes a file, also gs://; raises OSError as `opened` does."""
  if '://' in os.fspath(path):
    epath.Path(path).write_bytes(content)
    return
  with opened(path) as file:
    file.write(content)


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes a file of UTF-8, also gs://; raises OSError as `opened` does."""
  write_bytes(path, text.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes JSON on indented lines, also gs://.

  Raises:
    ValueError: if it holds nan or an infinity, which JSON does not know.
    OSError: as `opened`.
  """
  write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def remove_parts(folder: epath.PathLike) -> None:
  """Removes what kills have left in a folder that nobody else writes to."""
  for part in epath.Path(folder).glob('.*.part'):
    part.unlink()
