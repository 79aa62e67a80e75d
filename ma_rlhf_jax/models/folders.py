"""Folders that appear whole or not at all."""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import re
import shutil
import tempfile

from etils import epath
import jax
import safetensors

# What keeps a file from growing, and what to do.
_FULL = {
    errno.ENOSPC: 'free some',
    errno.EDQUOT: 'free some of your quota',
    errno.EFBIG: 'raise the limit on the size of a file (ulimit -f)',
}


class NoSpaceError(OSError):
  """A file could not grow before a folder was whole; nothing of it is left."""

  def __str__(self) -> str:
    return self.strerror


@contextlib.contextmanager
def whole(
    folder: str | os.PathLike[str], *, marker: str, overwrite: bool = False
) -> Iterator[pathlib.Path]:
  """An empty folder to fill, which then takes the place of `folder`.

  A local folder appears by a rename, and nothing is left where the filling
  fails. In a bucket the file `marker` is written last, so that a folder without
  it is not whole. Every process enters; what the first one wrote counts.

  Args:
    folder: where, also gs://.
    marker: name of the file without which the folder is not one.
    overwrite: replace a folder that is there.

  Raises:
    FileExistsError: if there is such a folder, not empty, and no `overwrite`,
      or a file.
    NoSpaceError: if the disk, a quota or the largest size of a file is reached.
  """
  target = epath.Path(folder)
  _check_free(target, overwrite)
  local = '://' not in os.fspath(folder)
  if local:
    target.parent.mkdir(parents=True, exist_ok=True)
  beside = {'dir': target.parent, 'prefix': f'.{target.name}-'} if local else {}
  with tempfile.TemporaryDirectory(**beside) as scratch:
    draft = pathlib.Path(scratch) / 'new'
    draft.mkdir()
    try:
      yield draft
      if jax.process_index() == 0:
        _rename(draft, target) if local else _upload(draft, target, marker)
    except (OSError, safetensors.SafetensorError) as error:
      if (number := _full(error)) is None:
        raise
      raise _no_space(target, scratch, number) from error


def _check_free(target: epath.Path, overwrite: bool) -> None:
  if not target.exists():
    return
  if not target.is_dir():
    raise FileExistsError(f'{target} is a file; choose another folder')
  if not overwrite and any(target.iterdir()):
    raise FileExistsError(
        f'{target} is there and not empty; choose another folder or remove it'
    )


def _full(error: BaseException) -> int | None:
  """Which of `_FULL` an error is; None = another one."""
  number = getattr(error, 'errno', None)
  # safetensors tells in words what the system said.
  if isinstance(error, safetensors.SafetensorError):
    said = re.search(r'\(os error (\d+)\)', str(error))
    number = int(said[1]) if said else None
  return number if number in _FULL else None


def _no_space(target: epath.Path, scratch: str, number: int) -> NoSpaceError:
  usage = shutil.disk_usage(scratch)
  reason = os.strerror(number)
  return NoSpaceError(
      number,
      f'{target}: {reason[0].lower()}{reason[1:]}, on the disk of '
      f'{pathlib.Path(scratch).parent} ({usage.total / 1e9:.3g} GB in all); '
      f'{_FULL[number]}, or choose another folder; what was written of this '
      'one is removed',
  )


def _rename(draft: pathlib.Path, target: epath.Path) -> None:
  """Puts the folder in place; what was there moves into the scratch folder."""
  old = draft.with_name('old')
  if target.exists():
    target.rename(old)
  try:
    draft.rename(target)
  except OSError:
    if old.exists():
      old.rename(target)
    raise


def _upload(draft: pathlib.Path, target: epath.Path, marker: str) -> None:
  """Removes what was there, the marker first; copies, the marker last."""
  target.mkdir(parents=True, exist_ok=True)
  for old in sorted(target.iterdir(), key=lambda p: p.name != marker):
    old.unlink()
  for new in sorted(draft.iterdir(), key=lambda p: p.name == marker):
    epath.Path(new).copy(target / new.name)
