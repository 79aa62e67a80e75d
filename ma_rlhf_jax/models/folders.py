"""Folders that appear whole or not at all."""

from collections.abc import Iterator
import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import re
import shutil
import stat

from etils import epath
import safetensors

from ma_rlhf_jax import interrupts
from ma_rlhf_jax.parallel import processes

_LOCK = 'lock'
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


def _beside(
    target: epath.Path, local: bool, overwrite: bool
) -> dict[str, epath.Path | str]:
  """Where the draft of a target, found free, is made; {} = anywhere."""
  with processes.together():
    if processes.is_first():
      if local and target.parent.is_dir():
        _sweep(target)
      _check_free(target, overwrite)
      if local:
        target.parent.mkdir(parents=True, exist_ok=True)
        return {'dir': target.parent, 'prefix': f'.{target.name}-'}
  return {}


@contextlib.contextmanager
def whole(
    folder: str | os.PathLike[str], *, marker: str, overwrite: bool = False
) -> Iterator[pathlib.Path]:
  """An empty folder to fill, which then takes the place of `folder`.

  A local folder appears by a rename, and nothing is left where the filling
  fails; what a kill leaves, the next one for that folder removes. In a bucket
  the file `marker` is written last, so that a folder without it is not whole.
  Every process enters and leaves together with the others; what the first one
  wrote counts.

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
  local = '://' not in os.fspath(folder)
  beside = _beside(target, local, overwrite)
  with (
      interrupts.temporary_folder(**beside) as scratch,
      _locked(pathlib.Path(scratch)),
  ):
    draft = pathlib.Path(scratch) / 'new'
    draft.mkdir()
    try:
      yield draft
      with processes.together():
        if processes.is_first():
          _follow_umask(draft)
          if local:
            with interrupts.held():
              _rename(draft, target)
          else:
            _upload(draft, target, marker)
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


@contextlib.contextmanager
def _locked(scratch: pathlib.Path) -> Iterator[None]:
  """Holds the lock by which a scratch folder is known to be in use."""
  with (scratch / _LOCK).open('w') as file:
    with contextlib.suppress(OSError):  # a file system without locks
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _sweep(target: epath.Path) -> None:
  """Removes scratch folders of processes that were killed.

  What one of them had moved out of the way comes back.
  """
  name = re.compile(rf'\.{re.escape(target.name)}-\w{{8}}')  # as of mkdtemp
  for path in pathlib.Path(target.parent).iterdir():
    if not name.fullmatch(path.name) or not (path / _LOCK).is_file():
      continue
    with (path / _LOCK).open('a') as file, contextlib.suppress(OSError):
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while it lives
      if (path / 'old').exists() and not target.exists():
        (path / 'old').rename(target)
      shutil.rmtree(path)


def _follow_umask(draft: pathlib.Path) -> None:
  """Gives all files the mode of a new one; those of safetensors are private."""
  new = draft.with_name(_LOCK).stat().st_mode
  for path in draft.rglob('*'):
    if path.is_file():
      path.chmod(stat.S_IMODE(new))


def _exchange(one: pathlib.Path, other: epath.Path) -> bool:
  """Swaps two folders in one step; whether the system can."""
  libc = ctypes.CDLL(None, use_errno=True)
  if not hasattr(libc, 'renameat2'):  # glibc of Linux has it since 2.28
    return False
  here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
  first, second = (os.fsencode(os.fspath(path)) for path in (one, other))
  return libc.renameat2(here, first, here, second, exchange) == 0


def _rename(draft: pathlib.Path, target: epath.Path) -> None:
  """Puts the folder in place; what was there moves into the scratch folder."""
  if target.exists() and draft.exists() and _exchange(draft, target):
    return
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
