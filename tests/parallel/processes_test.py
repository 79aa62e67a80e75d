"""Agreement of processes; threads play their parts over a store of keys."""

from collections.abc import Callable, Iterator
import os
import signal
import threading
from typing import Any

import jax
from jax._src import distributed
import pytest

from ma_rlhf_jax.parallel import processes

NUM = 3


class _Me(threading.local):
  """Which process this thread plays, and how far it has counted."""

  index = 0
  count = -1

  def __next__(self) -> int:
    self.count += 1
    return self.count


class _Store:
  """What jax's client does here, for threads."""

  def __init__(self) -> None:
    self._values: dict[str, str] = {}
    self._barrier = threading.Barrier(NUM)
    self._changed = threading.Condition()

  def key_value_set(self, key: str, value: str) -> None:
    with self._changed:
      assert key not in self._values
      self._values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
    with self._changed:
      self._changed.wait_for(lambda: key in self._values, milliseconds / 1000)
      return self._values[key]

  def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
    return [(k, v) for k, v in self._values.items() if k.startswith(prefix)]

  def wait_at_barrier(self, name: str, milliseconds: int) -> None:
    self._barrier.wait(min(20, milliseconds / 1000))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list]]:
  """Runs a function of the process's number as each of the processes."""
  me, store = _Me(), _Store()
  monkeypatch.setattr(processes, 'alone', lambda: False)
  monkeypatch.setattr(jax, 'process_index', lambda: me.index)
  monkeypatch.setattr(processes, '_client', lambda: store)
  monkeypatch.setattr(processes, '_exchanges', me)

  def run(function: Callable[[int], Any]) -> list[Any]:
    found: list[Any] = [None] * NUM

    def one(index: int) -> None:
      me.index = index
      try:
        found[index] = function(index)
      except Exception as error:
        found[index] = error

    threads = [threading.Thread(target=one, args=[i]) for i in range(NUM)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return found

  yield run


def test_jax_has_the_store_of_keys_that_is_used_here() -> None:
  assert distributed.global_state.client is None  # this process is alone
  names = ('key_value_set', 'key_value_dir_get', 'blocking_key_value_get')
  client = distributed._jax.DistributedRuntimeClient
  assert all(hasattr(client, n) for n in (*names, 'wait_at_barrier'))


def test_alone_nothing_is_exchanged() -> None:
  assert processes.alone() and processes.is_first()
  assert processes.first_then_rest(lambda: 7) == 7
  assert processes.agreed({'a': 1}) == {'a': 1}
  with pytest.raises(OSError, match='full'), processes.together():
    raise OSError('full')


def test_an_error_of_one_process_is_raised_on_all(play: Callable) -> None:
  def part(index: int) -> str:
    with processes.together():
      if index == 1:
        raise OSError('the disk is full')
    return 'went on'

  first, own, last = play(part)
  assert isinstance(own, OSError) and str(own) == 'the disk is full'
  for other in (first, last):
    assert isinstance(other, processes.ProcessError)
    assert str(other) == 'process 1: the disk is full'


def test_several_exchanges_do_not_mix(play: Callable) -> None:
  def part(index: int) -> list[str]:
    heard = []
    for turn in range(4):
      try:
        with processes.together():
          if turn == index:
            raise ValueError(f'turn {turn}')
      except (ValueError, processes.ProcessError) as error:
        heard.append(str(error))
      else:
        heard.append('')
    return heard

  assert play(part) == [
      ['turn 0', 'process 1: turn 1', 'process 2: turn 2', ''],
      ['process 0: turn 0', 'turn 1', 'process 2: turn 2', ''],
      ['process 0: turn 0', 'process 1: turn 1', 'turn 2', ''],
  ]


def test_the_others_begin_when_the_first_is_done(play: Callable) -> None:
  order: list[int] = []

  def part(index: int) -> int:
    return processes.first_then_rest(lambda: order.append(index) or 10 * index)

  assert play(part) == [0, 10, 20]
  assert order[0] == 0 and sorted(order) == [0, 1, 2]


@pytest.mark.parametrize('fails', [0, 2])
def test_what_fails_in_turn_fails_everywhere(
    play: Callable, fails: int
) -> None:
  called = []

  def part(index: int) -> None:
    def do() -> None:
      called.append(index)
      if index == fails:
        raise ValueError('no such field')

    processes.first_then_rest(do)

  found = play(part)
  assert [type(error) for error in found] == [
      ValueError if i == fails else processes.ProcessError for i in range(NUM)
  ]
  assert all('no such field' in str(error) for error in found)
  # Where the first fails the others do not begin.
  assert sorted(called) == ([0] if fails == 0 else [0, 1, 2])


def test_the_first_one_decides(play: Callable) -> None:
  assert play(lambda i: processes.agreed([i, 'a'])) == [[0, 'a']] * NUM


def test_sigterm_is_a_wish_that_is_told_once_asked() -> None:
  before = signal.getsignal(signal.SIGTERM)
  try:
    processes.catch_preemption()
    assert not processes.preempted()
    os.kill(os.getpid(), signal.SIGTERM)
    assert processes.preempted() and processes.preempted()
    # A second one would end the process.
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  finally:
    signal.signal(signal.SIGTERM, before)
    processes._signalled = False


@pytest.mark.parametrize(
    ('error', 'code'),
    [
        (SystemExit(75), 75),
        (SystemExit('error: words'), 1),
        (KeyboardInterrupt(), 130),
        (OSError('disk'), 1),
        (jax.errors.JaxRuntimeError('UNAVAILABLE: socket closed'), 75),
        (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 GiB'), 1),
    ],
)
def test_a_process_that_leaves_alone_says_so_by_its_code(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
  class _Left(Exception):  # noqa: N818
    pass

  def leave(code: int) -> None:
    raise _Left(code)

  monkeypatch.setattr(processes, 'alone', lambda: False)
  monkeypatch.setattr(processes, '_all_leave', lambda: False)
  monkeypatch.setattr(os, '_exit', leave)
  with pytest.raises(_Left) as left, processes.ending_together():
    raise error
  assert left.value.args == (code,)
  assert 'process 0 leaves without the others' in capfd.readouterr().err


def test_where_all_leave_the_end_is_orderly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(processes, 'alone', lambda: False)
  monkeypatch.setattr(processes, '_all_leave', lambda: True)
  with pytest.raises(SystemExit), processes.ending_together():
    raise SystemExit(1)
