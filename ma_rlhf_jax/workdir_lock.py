"""One holder of a workdir: two runs there would remove each other's files.

  <workdir>/.holder.json  which process writes in the folder; written again
                          every 15 s, as a sign of life
  <workdir>/.lock         locked for the moment in which a holder is looked for
                          and written, so that of two starts one comes first

Both are removed at the end. What a killed holder leaves does not count:

  same host     no process has its id, or one that started at another time has
  another host  the file has stayed the same for 120 s, by the clock of the one
                who looks, who waits for so long

In a bucket, and where files cannot be locked, a start writes its name, waits
for 2 s and reads whether it is still there. A holder that finds another name
ends its process, so that no mistake lasts.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import NoReturn, TextIO
import uuid

from etils import epath

from ma_rlhf_jax import atomic_file, interrupts

HOLDER, MUTEX = '.holder.json', '.lock'
BEAT, STALE = 15.0, 120.0  # seconds
_SETTLE, _POLL = 2.0, 2.0  # seconds


class HeldError(ValueError):
  """Another process writes in the workdir."""


class Clock:
  """Seconds from any moment on, and how to let them pass."""

  def now(self) -> float:
    """Seconds since some moment."""
    return time.monotonic()

  def sleep(self, seconds: float) -> None:
    """Lets so many pass."""
    time.sleep(seconds)


@dataclasses.dataclass(frozen=True)
class Holder:
  """A process that holds a workdir.

  Attributes:
    key: drawn anew by each.
    host: name of its host.
    machine: what tells where its process id means something: the host since it
      was booted, and the namespace; '' = unknown.
    pid: id of the process.
    start: when it started, in ticks of its kernel; 0 = unknown.
    since: when it took the workdir, for people.
    folder: device and inode of the workdir; a copy has others.
    beat: how often it gave a sign of life.
  """

  key: str
  host: str
  machine: str
  pid: int
  start: int
  since: str
  folder: tuple[int, ...]
  beat: int = 0

  def __str__(self) -> str:
    return f'process {self.pid} on host {self.host} (since {self.since})'


def this_process(folder: epath.Path) -> Holder:
  """This process as the holder of a folder."""
  pid = os.getpid()
  return Holder(
      key=uuid.uuid4().hex,
      host=socket.gethostname(),
      machine=_machine(),
      pid=pid,
      start=start_time(pid) or 0,
      since=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      folder=_identity(folder),
  )


def _machine() -> str:
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:  # no Linux
    return ''


def _identity(folder: epath.Path) -> tuple[int, ...]:
  if _in_bucket(folder):
    return ()
  found = os.stat(folder)
  return found.st_dev, found.st_ino


def _in_bucket(folder: epath.Path) -> bool:
  return '://' in os.fspath(folder)


def start_time(pid: int, proc: str = '/proc') -> int | None:
  """When a process of this host started, in ticks since the host did.

  None where there is no such process, or one that has ended and only waits for
  its parent to notice. Source: proc(5), fields 3 and 22 of /proc/PID/stat.
  """
  try:
    stat = pathlib.Path(f'{proc}/{pid}/stat').read_text()
  except (FileNotFoundError, ProcessLookupError):
    return None
  fields = stat.rpartition(')')[2].split()  # the name may hold blanks and )
  return None if fields[0] in 'ZX' else int(fields[19])


def _lives(holder: Holder, here: Holder) -> bool | None:
  """Whether a holder is alive; None where only its signs of life can tell."""
  if not here.machine or (holder.host, holder.machine) != (
      here.host,
      here.machine,
  ):
    return None
  if holder.folder != here.folder:  # the folder was copied from there
    return False
  if (start := start_time(holder.pid)) is not None:
    return start == holder.start
  try:
    os.kill(holder.pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # /proc hides the processes of other users
    return None
  return False  # it has ended, and its parent has not noticed


def read(folder: epath.Path) -> Holder | None:
  """Who holds a workdir, or held it when it was killed; None = nobody.

  Of a damaged file nobody's name can be read: its holder has an empty key, and
  only a sign of life, which writes the file anew, tells whether it lives.
  """
  try:
    fields = json.loads((folder / HOLDER).read_text())
    return Holder(**fields | {'folder': tuple(fields['folder'])})
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError):
    return Holder('', f'unknown ({HOLDER} is damaged)', '', 0, 0, 'unknown', ())


def _write(folder: epath.Path, holder: Holder) -> None:
  atomic_file.write_json(folder / HOLDER, dataclasses.asdict(holder))


def _same(path: pathlib.Path, file: TextIO) -> bool:
  """Whether an open file is still the one of that name."""
  try:
    return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
  except FileNotFoundError:
    return False


@contextlib.contextmanager
def _one_at_a_time(folder: epath.Path) -> Iterator[bool]:
  """A block that one process is in; yields whether that could be arranged."""
  if _in_bucket(folder):
    yield False
    return
  path = pathlib.Path(folder) / MUTEX
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      file = path.open('a')
    except FileNotFoundError:  # a holder left, and removed the empty folder
      continue
    with file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX)
      except OSError:  # a file system without locks
        yield False
        return
      if _same(path, file):
        yield True
        return


class Lock:
  """What `acquire` gives: the folder is this process's until `release`."""

  def __init__(
      self, folder: epath.Path, holder: Holder, made: list[epath.Path]
  ):
    self.folder, self.holder, self._made = folder, holder, made
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._live, daemon=True)
    self._thread.start()

  def _live(self) -> None:
    while not self._stop.wait(BEAT):
      # A full disk, say; the next one may come through.
      with contextlib.suppress(OSError):
        self.beat()

  def beat(self) -> None:
    """Gives a sign of life; ends the process where another has the folder."""
    found = read(self.folder)
    if found and found.key not in ('', self.holder.key):
      self._lost(found)
    self.holder = dataclasses.replace(self.holder, beat=self.holder.beat + 1)
    _write(self.folder, self.holder)

  def _lost(self, found: Holder) -> NoReturn:
    print(
        f'error: {self.folder} is now held by {found}, as this process gave no '
        'sign of life for too long; it ends, and the other one goes on',
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)

  def release(self) -> None:
    """Removes what `acquire` made; to be called after the last file."""
    self._stop.set()
    self._thread.join(_SETTLE)
    with contextlib.suppress(OSError), _one_at_a_time(self.folder):
      found = read(self.folder)
      ours = found and found.key in ('', self.holder.key)
      if ours:
        (self.folder / HOLDER).unlink()
      if not found or ours:
        (self.folder / MUTEX).unlink(missing_ok=True)
    _remove(self._made)


def _remove(folders: list[epath.Path]) -> None:
  """Removes folders, the inner one first, unless something is in them."""
  with contextlib.suppress(OSError):
    for folder in folders:
      os.rmdir(folder)


def _refuse(folder: epath.Path, holder: Holder) -> NoReturn:
  raise HeldError(
      f'--workdir={folder} is held by {holder}: wait for its end, or stop it '
      f'there (kill {holder.pid}), or give another --workdir'
  )


def _await(folder: epath.Path, holder: Holder, clock: Clock) -> None:
  """Waits until a holder is silent for long, or gone; raises if it lives."""
  print(
      f'{folder} was last held by {holder}; waiting up to {STALE:.0f} s for a '
      'sign of life of it',
      flush=True,
  )
  end = clock.now() + STALE
  while clock.now() < end:
    clock.sleep(_POLL)
    found = read(folder)
    if found is None:
      return
    if found != holder:
      _refuse(folder, found)


def acquire(path: epath.PathLike, clock: Clock | None = None) -> Lock:
  """Takes a workdir, which is made where it is missing.

  Args:
    path: absolute, also gs://.
    clock: stands for the real one in tests.

  Raises:
    HeldError: if a process holds it that is alive.
    OSError: if nothing can be written there.
  """
  folder = epath.Path(path)
  parents = () if _in_bucket(folder) else (folder, *folder.parents)
  made = [parent for parent in parents if not parent.exists()]
  try:
    return Lock(folder, _claimed(folder, clock or Clock()), made)
  except OSError:
    if made:
      with contextlib.suppress(OSError):
        (folder / MUTEX).unlink(missing_ok=True)
    _remove(made)
    raise


def _claimed(folder: epath.Path, clock: Clock) -> Holder:
  """This process as the holder of a folder, once nobody else is."""
  silent = None  # a holder of another host that gave no sign of life
  while True:
    with _one_at_a_time(folder) as alone:
      folder.mkdir(parents=True, exist_ok=True)
      mine, found = this_process(folder), read(folder)
      alive = _lives(found, mine) if found else False
      if alive:
        _refuse(folder, found)
      free = alive is False or found == silent
      if free:
        _write(folder, mine)
    if not free:
      _await(folder, found, clock)
      silent = found
      continue
    if alone:
      return mine
    clock.sleep(_SETTLE)
    if (kept := read(folder)) and kept.key == mine.key:
      return mine


@contextlib.contextmanager
def hold(path: epath.PathLike) -> Iterator[None]:
  """A block whose process alone writes in a workdir; raises as `acquire`."""
  lock = acquire(path)
  try:
    with interrupts.at_end(lock.release):
      yield
  finally:
    lock.release()
