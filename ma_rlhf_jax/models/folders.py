"""Folders that appear whole or not at all."""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import shutil
import tempfile

from etils import epath
import safetensors

from ma_rlhf_jax.parallel import processes

_FULL = (errno.ENOSPC, errno.EDQUOT)


class NoSpaceError(OSError):
  """The disk was full before a folder was whole; nothing of it is left."""


@contextlib.contextmanager
def whole(
    folder: str | os.PathLike[str], *, marker: str, overwrite: bool = False
) -> Iterator[pathlib.Path]:
  """An empty folder to fill, which then takes the place of `folder`.

  A local folder appears by a rename, and nothing is left where the filling
  fails. In a bucket the file `marker` is written last, so that a folder without
  it is not whole. Every process enters and leaves together with the others;
  what the first one wrote counts.

  Args:
    folder: where, also gs://.
    marker: name of the file without which the folder is not one.
    overwrite: replace a folder that is there.

  Raises:
    FileExistsError: if there is such a folder, not empty, and no `overwrite`,
      or a file.
    NoSpaceError: if the disk is full.
  """
  target = epath.Path(folder)
  local = '://' not in os.fspath(folder)
  beside = {}
  with processes.together():
    if processes.is_first():
      _check_free(target, overwrite)
      if local:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = {'dir': target.parent, 'prefix': f'.{target.name}-'}
  with tempfile.TemporaryDirectory(**beside) as scratch:
    draft = pathlib.Path(scratch) / 'new'
    draft.mkdir()
    try:
      yield draft
      with processes.together():
        if processes.is_first():
          _rename(draft, target) if local else _upload(draft, target, marker)
    except (OSError, safetensors.SafetensorError) as error:
      if not _is_full(error):
        raise
      raise _no_space(target, scratch) from error


def _check_free(target: epath.Path, overwrite: bool) -> None:
  if not target.exists():
    return
  if not target.is_dir():
    raise FileExistsError(f'{target} is a file; choose another folder')
  if not overwrite and any(target.iterdir()):
    raise FileExistsError(
        f'{target} is there and not empty; choose another folder or remove it'
    )


def _is_full(error: BaseException) -> bool:
  # safetensors tells in words what the system said; a folder may be filled
  # inside of another.
  full = isinstance(error, NoSpaceError) or (
      isinstance(error, OSError) and error.errno in _FULL
  )
  words = isinstance(error, safetensors.SafetensorError)
  return full or words and 'No space left' in str(error)


def _no_space(target: epath.Path, scratch: str) -> NoSpaceError:
  usage = shutil.disk_usage(scratch)
  return NoSpaceError(
      f'{target}: no space left on the disk of {pathlib.Path(scratch).parent} '
      f'({usage.total / 1e9:.3g} GB in all); free some, or choose another '
      'folder; what was written of this one is removed'
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
