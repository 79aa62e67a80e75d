"""Ctrl-C at the places where Python's own way loses or garbles it.

`commands_interrupted_test.py` presses it in the commands themselves.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

_BEGIN = """
import atexit, gc, hashlib, os, signal, sys, time
from ma_rlhf_jax import interrupts
interrupts.end_on_ctrl_c('stopped')
ready = lambda: os.write(1, b'ready\\n')
# Seconds in C, as a compile has them: without an instruction of Python.
in_c = lambda n=10**9: hashlib.pbkdf2_hmac('sha256', b'', b'', n)
def busy(seconds=60):
  end = time.monotonic() + seconds
  while time.monotonic() < end: sum(range(100))
"""


def _run(code: str, times: int = 1, begin: str = _BEGIN) -> tuple:
  """(exit code, output, error) of a process; Ctrl-C at each line `ready`."""
  process = subprocess.Popen(
      [sys.executable, '-c', begin + code],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'},
  )
  for _ in range(times):
    assert process.stdout.readline() == 'ready\n'
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
  output, error = process.stdout.read(), process.stderr.read()
  return process.wait(60), output, error


@pytest.mark.parametrize(
    'code',
    [
        'ready(); busy()',
        'ready(); in_c()',
        'ready(); time.sleep(60)',
        'ready(); sys.stdin.readline() or time.sleep(60)',
        # KeyboardInterrupt is "ignored" in the first two.
        'gc.callbacks.append(lambda *_: (ready(), busy())); gc.collect()',
        'class X:\n  def __del__(self): ready(); busy()\nX()',
        'try:\n  ready(); busy()\nexcept BaseException: busy()',
        'atexit.register(lambda: (ready(), busy()))',
    ],
    ids=['python', 'c', 'sleep', 'input', 'gc', 'del', 'except', 'exit'],
)
def test_one_line_and_130_wherever_it_comes(code: str) -> None:
  assert _run(code) == (130, '', 'stopped\n')


def test_what_was_printed_is_not_lost() -> None:
  # Into a pipe, so that Python keeps it until the end.
  code = "print('printed'); ready(); busy()"
  assert _run(code) == (130, 'printed\n', 'stopped\n')


@pytest.mark.parametrize('where', ['busy()', 'in_c()'])
def test_blocks_clean_up_the_inner_one_first(
    tmp_path: pathlib.Path, where: str
) -> None:
  code = f"""
with interrupts.at_end(lambda: 'the outer'):
  with interrupts.at_end(lambda: 'not this'):
    pass
  with interrupts.temporary_folder(dir={str(tmp_path)!r}) as folder:
    open(folder + '/file', 'w').close()
    with interrupts.at_end(lambda: os.remove('/nonexistent')):
      ready(); {where}
"""
  assert _run(code) == (130, '', 'stopped; the outer\n')
  assert not list(tmp_path.iterdir())


def test_a_held_block_comes_to_its_end() -> None:
  code = """
with interrupts.held():
  ready(); busy(0.5); os.write(1, b'whole\\n')
os.write(1, b'never\\n')
"""
  assert _run(code) == (130, 'whole\n', 'stopped\n')


@pytest.mark.parametrize('where', ['busy()', 'in_c()'])
def test_a_second_one_ends_a_held_block(where: str) -> None:
  code = f"""
with interrupts.at_end(lambda: 'cleaned'), interrupts.held():
  ready(); busy(0.7); ready(); {where}
"""
  assert _run(code, times=2) == (130, '', 'stopped\n')


def test_a_second_one_ends_what_the_first_one_cleans() -> None:
  code = """
with interrupts.at_end(lambda: (ready(), busy())):
  ready(); busy()
"""
  assert _run(code, times=2) == (130, '', 'stopped\n')


@pytest.mark.parametrize('where', ['busy(0.3)', 'in_c(7 * 10**5)'])
def test_a_noted_block_decides_and_the_next_one_starts_afresh(
    where: str,
) -> None:
  code = f"""
for _ in range(2):
  with interrupts.noted() as came:
    ready(); {where}; busy(0.1); print(came())
"""
  assert _run(code) == (0, 'ready\nTrue\nFalse\n', '')


@pytest.mark.parametrize('where', ['busy(0.3)', 'in_c(7 * 10**5)'])
def test_a_second_one_ends_a_noted_block(where: str) -> None:
  code = f"""
with interrupts.noted():
  ready(); {where}; busy(0.1); ready(); busy()
"""
  assert _run(code, times=2) == (130, '', 'stopped\n')


def test_a_raising_block_gets_the_exception() -> None:
  code = """
try:
  with interrupts.raising():
    ready(); busy()
except KeyboardInterrupt:
  os.write(1, b'asked again\\n')
ready(); busy()
"""
  process = subprocess.Popen(
      [sys.executable, '-c', _BEGIN + code],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )
  for line in ('ready\n', 'asked again\n', 'ready\n'):
    assert process.stdout.readline() == line
    if line == 'ready\n':
      time.sleep(0.05)
      process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=60) == ('', 'stopped\n')
  assert process.returncode == 130


def test_a_forked_child_ends_without_a_word() -> None:
  code = """
import warnings
warnings.simplefilter('ignore')  # from Python 3.12 on, fork with threads warns
if not os.fork():
  ready(); os.kill(os.getpid(), signal.SIGINT); busy()
os.wait(); ready(); busy()
"""
  process = subprocess.Popen(
      [sys.executable, '-c', _BEGIN + code],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )
  assert process.stdout.readline() == process.stdout.readline() == 'ready\n'
  time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=60) == ('', 'stopped\n')


def test_where_it_is_ignored_it_stays_ignored() -> None:
  begin = 'import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n'
  code = "ready(); busy(0.3); print('done')"
  assert _run(code, begin=begin + _BEGIN) == (0, 'done\n', '')


def test_other_signals_are_none_of_its_business() -> None:
  code = """
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'usr1\\n'))
os.kill(os.getpid(), signal.SIGUSR1)
busy(0.8)
"""
  assert _run(code, times=0) == (0, 'usr1\n', '')


def test_other_threads_do_not_report_what_is_taken_from_them() -> None:
  code = """
import threading
gone = threading.Event()
def complain():
  gone.wait()
  print('it is gone', file=sys.stderr, flush=True)
threading.Thread(target=complain, daemon=True).start()
def take():
  gone.set()
  time.sleep(0.2)
with interrupts.at_end(take):
  ready(); busy()
"""
  assert _run(code) == (130, '', 'stopped\n')
