"""JSONL written aside: the file appears when it is whole, or not at all."""

from collections.abc import Iterable, Mapping
import contextlib
import json
import pathlib
from typing import Any, TextIO

from ma_rlhf_jax import atomic_file

Row = Mapping[str, Any]


def dump(row: Row) -> str:
  """The line of a row, without its end; in UTF-8 wherever that can be."""
  line = json.dumps(row, ensure_ascii=False, allow_nan=False)
  try:
    line.encode()
  except UnicodeEncodeError:  # half a character in a field of the user
    return json.dumps(row, allow_nan=False)
  return line


def check_place(flag: str, path: str) -> None:
  """Raises OSError where no file can be at `path`, which `--flag` names.

  A local one; its folder must exist.
  """
  file = pathlib.Path(path)
  if file.is_dir():
    raise IsADirectoryError(f'--{flag}={path} is a folder; name a file in it')
  if not file.parent.is_dir():
    raise FileNotFoundError(
        f'--{flag}={path}: there is no folder {file.parent}; make it, or name '
        'another'
    )


def check(path: str, overwrite: bool, source: str = '') -> None:
  """Raises where an output cannot be written.

  Args:
    path: local; its folder must exist.
    overwrite: what is there may be replaced.
    source: the file that is read meanwhile; ''.

  Raises:
    FileExistsError: if it is there, or what an earlier end left of it, and no
      `overwrite`.
    ValueError: if the rows would be written over `source`.
    OSError: if it is a folder, or its folder is not there.
  """
  where = f'--output={path}'
  check_place('output', path)
  file = pathlib.Path(path)
  partial = _partial(path)
  if source and partial.exists() and partial.samefile(source):
    raise ValueError(
        f'--input={source} is where {where} is written until it is whole; '
        'rename it, or name another output'
    )
  if file.exists() and not overwrite:
    raise FileExistsError(
        f'{where} is there already; name another file, or give --overwrite'
    )
  if partial.exists() and not overwrite:
    raise FileExistsError(_left(partial))


def _partial(path: str) -> pathlib.Path:
  return pathlib.Path(f'{path}.partial')


def _left(partial: pathlib.Path) -> str:
  return (
      f'{partial} is there: rows of a run that was ended, or still goes on; '
      'rename it to keep them, or give --overwrite'
  )


class Output:
  """A JSONL file whose rows are finished in any order.

  Rows go to `<path>.partial` as they are finished, so that an end before the
  last one loses none. `commit` puts all of them in order and renames.
  """

  def __init__(self, path: str, overwrite: bool = False):
    """Opens the partial file.

    Args:
      path: see `check`.
      overwrite: replace what an earlier end left.

    Raises:
      FileExistsError: if there is a partial file, and no `overwrite`.
    """
    self._path = pathlib.Path(path)
    self._partial = _partial(path)
    mode = 'w' if overwrite else 'x'
    try:
      self._file: TextIO = self._partial.open(mode, encoding='utf-8')
    except FileExistsError:
      raise FileExistsError(_left(self._partial)) from None
    self._rows: dict[int, list[str]] = {}

  def __len__(self) -> int:
    """How many rows of the input are finished."""
    return len(self._rows)

  def add(self, index: int, rows: Iterable[Row]) -> None:
    """Keeps what came of row `index` of the input."""
    lines = [dump(row) + '\n' for row in rows]
    self._rows[index] = lines
    self._file.writelines(lines)

  def flush(self) -> None:
    """Sees to it that all rows that were added are in the partial file."""
    self._file.flush()

  def commit(self) -> None:
    """Puts the rows in the order of the input, and the file in its place."""
    with atomic_file.opened(self._path) as file:
      for index in sorted(self._rows):
        file.write(''.join(self._rows[index]).encode())
    self._file.close()
    self._partial.unlink()

  def abandon(self) -> str:
    """Closes without `commit`; an empty partial file is removed.

    Returns:
      What to tell the user; '' where no row is lost.
    """
    with contextlib.suppress(OSError):  # no space left, say
      self._file.close()
    if not self._rows:
      self._partial.unlink(missing_ok=True)
      return ''
    return (
        f'{self._path} is not written; what is done of it ({len(self)} rows of '
        f'the input) is in {self._partial}, in the order it was finished'
    )
