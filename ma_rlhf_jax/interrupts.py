"""Ctrl-C ends a command with one line and exit code 130, wherever it is.

A command calls `end_on_ctrl_c` before it imports anything large. From then on
Ctrl-C raises no KeyboardInterrupt, which is lost in a callback of the garbage
collector and prints a traceback out of an import. What happens instead:

  the main thread runs Python    it ends the process there
  the main thread is in C++      (a compile, a wait for a device) a second
                                 thread ends the process after half a second
  in a `held` block              the process ends after the block
  in a `noted` block             the block is told, and decides
  a second Ctrl-C                ends the process at once

The stack is not unwound, so a block that leaves something behind (a scratch
folder, a child process) says by `at_end` how it is removed. What is not removed
must be harmless: a kill at the same moment would leave it as well.
"""

import atexit
from collections.abc import Callable, Iterator
import contextlib
import os
import select
import signal
import sys
import tempfile
import threading
import time
from typing import Any, NoReturn

EXIT_CODE = 130  # 128 + SIGINT, as shells have it
_LATE = 0.5  # seconds after which the main thread is taken to be in C++

Cleanup = Callable[[], str | None]


class _State:
  """What the handler, the second thread and the blocks share."""

  def __init__(self) -> None:
    self.message = 'interrupted'
    self.pipe = (-1, -1)  # one byte for each signal that no thread has treated
    self.cleanups: list[Cleanup] = []
    self.held = self.noted = 0  # blocks entered
    self.raising = False
    self.asked = False  # Ctrl-C came in a block that goes on
    self.errors = 2  # where the line goes: standard error
    self.ending = threading.Lock()  # locked once the process ends
    self.said = threading.Lock()


_state = _State()


def end_on_ctrl_c(message: str = 'interrupted') -> None:
  """From here on Ctrl-C prints `message` and ends the process with 130.

  To be called once, by the main thread. Where SIGINT is ignored, as in the
  background jobs of a shell script, it stays ignored.

  Args:
    message: one line for the standard error.
  """
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    return
  _state.message = message
  _state.pipe = os.pipe()
  for end in _state.pipe:
    os.set_blocking(end, False)
  signal.set_wakeup_fd(_state.pipe[1], warn_on_full_buffer=False)
  signal.signal(signal.SIGINT, _handle)
  threading.Thread(target=_watch, daemon=True).start()
  # Registered first, so called last: the work is done by then.
  atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
  os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
  """A child that was forked, and not yet replaced, ends without a word."""
  signal.set_wakeup_fd(-1)
  signal.signal(signal.SIGINT, signal.SIG_DFL)


def _taken() -> int:
  """How many times Ctrl-C was pressed that nothing has answered yet."""
  try:
    return os.read(_state.pipe[0], 512).count(signal.SIGINT)
  except BlockingIOError:
    return 0


def _handle(*unused: Any) -> None:
  """Runs in the main thread, between two of its instructions."""
  times = _taken()
  if _state.ending.locked():  # by the second thread
    if times:
      _leave('')
    time.sleep(3600)  # what it removes must not be made again
  if times and _state.raising:
    raise KeyboardInterrupt
  if times:
    _answer(times)


def _watch() -> None:
  """Answers in place of a main thread that is in C++."""
  while True:
    select.select([_state.pipe[0]], [], [])
    time.sleep(_LATE)
    if not _state.raising and (times := _taken()):
      _answer(times)


def _answer(times: int) -> None:
  """Ends the process, unless a block is to go on."""
  again = _state.asked or times > 1
  _state.asked = True
  if again or not (_state.held or _state.noted):
    end()


def end() -> NoReturn:
  """Ends the process as the first Ctrl-C does; a second call is the second."""
  if not _state.ending.acquire(blocking=False):
    _leave('')
  _silence()
  words = [_state.message]
  try:
    # What a block is in the middle of is left as a kill would leave it.
    for cleanup in [] if _state.held else reversed(list(_state.cleanups)):
      with contextlib.suppress(OSError):
        words.append(cleanup() or '')
    with contextlib.suppress(OSError, ValueError, RuntimeError):
      sys.stdout.flush()  # RuntimeError: it was interrupted while it wrote
  finally:
    _leave('; '.join(filter(None, words)))


def _silence() -> None:
  """Nothing but the line of this module reaches the standard error any more.

  Other threads run on for a moment, and would report what is taken away from
  them: a parser that has ended, say.
  """
  with contextlib.suppress(OSError):
    _state.errors = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)


def _leave(line: str) -> NoReturn:
  """Writes the line, unless it is written, and ends; runs nothing else.

  Threads that still compile would crash in an orderly end.
  """
  if _state.said.acquire(blocking=False):
    # A progress bar may be in the line of a terminal.
    start = '\n' if os.isatty(_state.errors) else ''
    with contextlib.suppress(OSError):
      os.write(_state.errors, f'{start}{line or _state.message}\n'.encode())
  os._exit(EXIT_CODE)


@contextlib.contextmanager
def at_end(cleanup: Cleanup) -> Iterator[None]:
  """A block that Ctrl-C ends by calling `cleanup`.

  Args:
    cleanup: called in the main thread, or while that is in C++; OSErrors of it
      are passed over. What it returns is added to the message.
  """
  _state.cleanups.append(cleanup)
  try:
    yield
  finally:
    _state.cleanups.remove(cleanup)


@contextlib.contextmanager
def held() -> Iterator[None]:
  """A block of the main thread, of moments, which only a second Ctrl-C cuts."""
  _state.held += 1
  try:
    yield
  finally:
    _state.held -= 1
    if _state.asked and not (_state.held or _state.noted):
      end()


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
  """A block that the first Ctrl-C does not end; yields whether it came."""
  _state.noted += 1
  try:
    yield lambda: _state.asked
  finally:
    _state.noted -= 1
    _state.asked = False


@contextlib.contextmanager
def raising() -> Iterator[None]:
  """A block in which Ctrl-C is a KeyboardInterrupt: a wait for a line, say."""
  _state.raising = True
  try:
    yield
  finally:
    _state.raising = False


@contextlib.contextmanager
def temporary_folder(**where: Any) -> Iterator[str]:
  """`tempfile.TemporaryDirectory(**where)`, which Ctrl-C removes as well."""
  with held():
    folder = tempfile.TemporaryDirectory(**where)
    stack = contextlib.ExitStack()
    stack.enter_context(folder)
    stack.enter_context(at_end(folder.cleanup))
  with stack:
    yield folder.name
