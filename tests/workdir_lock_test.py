"""One process at a time writes in a workdir, and no dead one keeps it."""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from etils import epath
import pytest

from ma_rlhf_jax import workdir_lock as lib


class _Clock(lib.Clock):
  """Time that passes at once; `events` happen when their second is reached."""

  def __init__(self, events: dict[float, Callable[[], Any]] | None = None):
    self._now, self._events = 0.0, dict(events or {})

  def now(self) -> float:
    return self._now

  def sleep(self, seconds: float) -> None:
    self._now += seconds
    for at in sorted(self._events):
      if at <= self._now:
        self._events.pop(at)()


def _leave(folder: pathlib.Path, **changed: Any) -> lib.Holder:
  """Writes a holder file as another process would have."""
  folder.mkdir(parents=True, exist_ok=True)
  mine = lib.this_process(epath.Path(folder))
  holder = dataclasses.replace(mine, key='other', **changed)
  lib._write(epath.Path(folder), holder)
  return holder


def _names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def test_a_live_holder_is_named_with_what_to_do(tmp_path: pathlib.Path) -> None:
  with lib.hold(tmp_path / 'runs' / 'a'):
    with pytest.raises(lib.HeldError) as caught:
      lib.acquire(tmp_path / 'runs' / 'a')
    said = str(caught.value)
    assert f'process {os.getpid()} on host {os.uname().nodename}' in said
    assert f'kill {os.getpid()}' in said and '--workdir' in said
    assert '\n' not in said
  assert not list(tmp_path.iterdir())  # it leaves nothing
  with lib.hold(tmp_path / 'runs' / 'a'):  # and is free
    pass


def test_the_folder_of_a_run_stays_when_its_holder_leaves(
    tmp_path: pathlib.Path,
) -> None:
  with lib.hold(tmp_path / 'a'):
    (tmp_path / 'a' / 'config.json').write_text('{}')
  assert _names(tmp_path / 'a') == ['config.json']


_HOLD = """
import os, signal, sys
from ma_rlhf_jax import workdir_lock
with workdir_lock.hold(sys.argv[1]):
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_holder_of_this_host_does_not_count(
    tmp_path: pathlib.Path,
) -> None:
  done = subprocess.run([sys.executable, '-c', _HOLD, str(tmp_path / 'a')])
  assert done.returncode == -9 and '.holder.json' in _names(tmp_path / 'a')
  # A clock that stands still: nothing may be waited for.
  lib.acquire(tmp_path / 'a', _Clock({0.0: pytest.fail})).release()


def test_a_killed_holder_that_its_parent_has_not_noticed_does_not_count(
    tmp_path: pathlib.Path,
) -> None:
  process = subprocess.Popen([sys.executable, '-c', _HOLD, str(tmp_path / 'a')])
  end = time.monotonic() + 60
  while lib.start_time(process.pid) is not None and time.monotonic() < end:
    time.sleep(0.02)
  os.kill(process.pid, 0)  # it is there, a zombie
  lib.acquire(tmp_path / 'a', _Clock({0.0: pytest.fail})).release()
  process.wait()


def test_another_process_with_the_id_of_the_holder_does_not_count(
    tmp_path: pathlib.Path,
) -> None:
  _leave(tmp_path, start=lib.start_time(os.getpid()) - 1)
  lib.acquire(tmp_path, _Clock({0.0: pytest.fail})).release()


def test_a_copy_of_a_live_workdir_is_free(tmp_path: pathlib.Path) -> None:
  with lib.hold(tmp_path / 'a'):
    (tmp_path / 'b').mkdir()
    text = (tmp_path / 'a' / lib.HOLDER).read_text()
    (tmp_path / 'b' / lib.HOLDER).write_text(text)
    lib.acquire(tmp_path / 'b', _Clock({0.0: pytest.fail})).release()


@pytest.mark.parametrize(
    'elsewhere',
    [{'host': 'h2'}, {'machine': 'boot pid:[7]'}, {'machine': ''}],
    ids=['another host', 'another namespace', 'no /proc'],
)
def test_a_silent_holder_elsewhere_is_waited_out(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, elsewhere: dict
) -> None:
  _leave(tmp_path, pid=12, **elsewhere)
  clock = _Clock()
  lock = lib.acquire(tmp_path, clock)
  assert lib.STALE <= clock.now() < lib.STALE + 10
  assert lib.read(epath.Path(tmp_path)).key == lock.holder.key
  lock.release()
  said = capsys.readouterr().out
  assert said.count('\n') == 1 and 'process 12' in said and '120 s' in said


def test_a_sign_of_life_from_elsewhere_is_a_refusal(
    tmp_path: pathlib.Path,
) -> None:
  _leave(tmp_path, host='h2', pid=12, beat=4)
  beats = lambda: _leave(tmp_path, host='h2', pid=12, beat=5)
  with pytest.raises(lib.HeldError, match='process 12 on host h2'):
    lib.acquire(tmp_path, _Clock({lib.STALE - 10: beats}))


def test_a_holder_elsewhere_that_leaves_is_followed_at_once(
    tmp_path: pathlib.Path,
) -> None:
  _leave(tmp_path, host='h2')
  clock = _Clock({20.0: (tmp_path / lib.HOLDER).unlink})
  lib.acquire(tmp_path, clock).release()
  assert 20 <= clock.now() < 30


def test_without_file_locks_the_later_of_two_writers_is_seen(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As in a bucket: both write, and the first one reads the other's name."""

  def refused(*unused: Any) -> None:
    raise OSError('no locks')

  monkeypatch.setattr(lib.fcntl, 'flock', refused)
  other = lambda: _leave(tmp_path, host='h2', pid=9)
  beats = lambda: _leave(tmp_path, host='h2', pid=9, beat=1)
  with pytest.raises(lib.HeldError, match='process 9 on host h2'):
    lib.acquire(tmp_path, _Clock({1.0: other, 20.0: beats}))


def test_signs_of_life_are_written_and_another_holder_ends_the_process(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
  def ended(code: int) -> None:
    raise SystemExit(code)

  lock = lib.acquire(tmp_path)
  for expected in (1, 2):
    lock.beat()
    assert json.loads((tmp_path / lib.HOLDER).read_text())['beat'] == expected
  monkeypatch.setattr(lib.os, '_exit', ended)
  _leave(tmp_path, host='h2', pid=31)
  with pytest.raises(SystemExit) as caught:
    lock.beat()
  assert caught.value.code == 1
  assert 'held by process 31 on host h2' in capsys.readouterr().err
  lock.release()
  assert lib.HOLDER in _names(tmp_path)  # which is the other's


def test_a_full_disk_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def full(*unused: Any) -> None:
    raise OSError('no space left')

  monkeypatch.setattr(lib, '_write', full)
  with pytest.raises(OSError, match='no space left'):
    lib.acquire(tmp_path / 'runs' / 'a')
  assert not list(tmp_path.iterdir())


def test_of_a_damaged_holder_file_a_sign_of_life_is_awaited(
    tmp_path: pathlib.Path,
) -> None:
  for text in ('', '{"key": 1', '[]', '{"key": "a"}', '{"folder": 3}'):
    (tmp_path / lib.HOLDER).write_text(text)
    clock = _Clock()
    lib.acquire(tmp_path, clock).release()
    assert clock.now() >= lib.STALE
  lock = lib.acquire(tmp_path)
  (tmp_path / lib.HOLDER).write_text('{"key": "x')
  with pytest.raises(lib.HeldError):  # it writes its name again
    lib.acquire(tmp_path, _Clock({30.0: lock.beat}))
  lock.release()
  assert not (tmp_path / lib.HOLDER).exists()


_RACE = """
import sys, time
from ma_rlhf_jax import workdir_lock
print('ready', flush=True)
sys.stdin.readline()
for path in sys.argv[1:]:
  try:
    lock = workdir_lock.acquire(path)
    print('got', flush=True)
    time.sleep(0.05)
    sys.stdin.readline()
    lock.release()
  except workdir_lock.HeldError:
    print('refused', flush=True)
    sys.stdin.readline()
"""


def test_of_two_starts_at_the_same_instant_one_is_refused(
    tmp_path: pathlib.Path,
) -> None:
  folders = [str(tmp_path / f'runs-{i}' / 'a') for i in range(20)]
  # Half of them were left by a killed holder, which both find dead.
  for folder in folders[::2]:
    _leave(pathlib.Path(folder), start=1)
  command = [sys.executable, '-c', _RACE, *folders]
  both = [
      subprocess.Popen(
          command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
      )
      for _ in range(2)
  ]
  ends = []
  for process in both:
    assert process.stdout.readline() == 'ready\n'
  for _ in folders:
    for process in both:
      process.stdin.write('\n')
      process.stdin.flush()
    ends.append(sorted(process.stdout.readline() for process in both))
  for process in both:
    process.communicate('\n')
  assert ends == [['got\n', 'refused\n']] * len(folders)
