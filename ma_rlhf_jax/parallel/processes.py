"""Several processes as one program: how they begin, agree, stop and end.

Each process drives the devices of its host and runs the same programs in the
same order. What only one of them sees (a full disk, a signal, an error) must
become known to all before the next program that spans them; otherwise the
others wait in it for good.

  process 0   do() ---- told --+------------------- same result or same error
  process 1        waits       +-- do() ---- told --+
"""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import json
import os
import signal
import sys
import traceback
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the store of keys has no public name
from jax.experimental import multihost_utils

T = TypeVar('T')

# EX_TEMPFAIL of sysexits.h: told to stop, or others were lost; to be started
# again.
EXIT_AGAIN = 75

# The first process may prepare data, or write a model, for so long.
_LONGEST_WAIT = 24 * 3600  # seconds
_LEAVING = 10  # seconds
# Every process counts its exchanges and its looks at the signal alike.
_exchanges, _looks = itertools.count(), itertools.count()
_signalled = False


class ProcessError(RuntimeError):
  """Another process failed; the message says which and why."""


class Preempted(Exception):  # noqa: N818 - no error
  """The run was told to stop, and has saved; the same command goes on."""


def alone() -> bool:
  """Whether this process is the only one; touches no device."""
  return not jax.distributed.is_initialized()


def is_first() -> bool:
  """Whether this process tells and writes what only one of them should."""
  return alone() or jax.process_index() == 0


def _client() -> Any:
  return distributed.global_state.client


def _failures(failure: str) -> list[tuple[int, str]]:
  """(process, message) of each that failed; waits until all have told.

  Args:
    failure: of this process; '' = none.
  """
  name = f'ma_rlhf_jax/exchange-{next(_exchanges)}'
  if failure:
    _client().key_value_set(f'{name}/{jax.process_index()}', failure)
  _client().wait_at_barrier(name, _LONGEST_WAIT * 1000)
  told = _client().key_value_dir_get(f'{name}/')
  return sorted((int(key.rpartition('/')[2]), text) for key, text in told)


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A block that succeeds on all processes, or raises on all of them.

  Holds nothing that spans processes: those that fail would not take part.

  Raises:
    ProcessError: if the block was left with an error on another process only.
  """
  if alone():
    yield
    return
  try:
    yield
  except Exception as error:
    _failures(str(error) or type(error).__name__)
    raise
  if failures := _failures(''):
    process, text = failures[0]
    raise ProcessError(f'process {process}: {text}')


def first_then_rest(do: Callable[[], T]) -> T:
  """`do()` of this process, called on the others after it is done on the first.

  So they find what the first one has written. An error of any is one on all.

  Raises:
    ProcessError: as `together`.
  """
  if is_first():
    with together():
      result = do()
  else:
    with together():
      pass
  with together():
    return result if is_first() else do()


def agreed(value: T) -> T:
  """The first process's value on all; it can be written as JSON.

  For decisions that depend on files, which need not look alike everywhere.
  """
  if alone():
    return value
  name = f'ma_rlhf_jax/exchange-{next(_exchanges)}'
  if is_first():
    _client().key_value_set(name, json.dumps(value))
  return json.loads(
      _client().blocking_key_value_get(name, _LONGEST_WAIT * 1000)
  )


def catch_preemption() -> None:
  """From here on SIGTERM is a wish to stop, which `preempted` tells.

  With several processes jax listens already; alone, a second SIGTERM ends the
  process at once.
  """
  global _signalled
  _signalled = False
  if alone():
    signal.signal(signal.SIGTERM, _note_signal)


def _note_signal(number: int, _: Any) -> None:
  global _signalled
  _signalled = True
  signal.signal(number, signal.SIG_DFL)


def preempted() -> bool:
  """Whether any process was told to stop; the same answer on all.

  Every process must ask equally often: jax chooses a call, the same for all,
  at which it says yes once.
  """
  if alone():
    return _signalled
  return multihost_utils.reached_preemption_sync_point(next(_looks))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """A program whose other processes end too where this one breaks.

  An orderly end waits for the others, who may wait in a program for this one.
  So a process that the others do not follow within seconds leaves without them:
  they are ended by their launcher, or by jax after its heartbeats (100 s).
  """
  try:
    yield
  except BaseException as error:
    if alone() or isinstance(error, SystemExit) and _all_leave():
      raise
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    print(
        f'process {jax.process_index()} leaves without the others: {error}',
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_exit_code(error))


def _all_leave() -> bool:
  try:
    _client().wait_at_barrier('ma_rlhf_jax/leave', _LEAVING * 1000)
  except jax.errors.JaxRuntimeError:
    return False
  return True


def _exit_code(error: BaseException) -> int:
  if isinstance(error, SystemExit):
    return error.code if isinstance(error.code, int) else 1
  if isinstance(error, KeyboardInterrupt):
    return 130
  # What XLA says when others are gone; their own codes tell more.
  lost = isinstance(error, jax.errors.JaxRuntimeError)
  return EXIT_AGAIN if lost and 'RESOURCE_EXHAUSTED' not in str(error) else 1
