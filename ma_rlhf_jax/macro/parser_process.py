"""A process of a user's parser: JSON lines in and out, within limits of time.

It may hang, die, talk of other things or leave children behind.
"""

from collections.abc import Sequence
import json
import os
import queue
import signal
import subprocess
import threading
import time
from typing import Any, TextIO

# Limits for one text and for the first one, which may load a model.
ANSWER_SECONDS = 60.0
START_SECONDS = 600.0
# Deaths without an answer between them, after which it is not started again.
MAX_DEATHS = 4
_ANSWER_FIELDS = ('trees', 'error', 'text')


def _kill_group(process: subprocess.Popen[str]) -> None:
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass  # it has ended by itself


def _answer(line: str, text: str) -> dict[str, Any] | None:
  """A line of a parser as the answer to a text; None if it is none.

  It may give the text back, and then the text must be this one. Messages and
  answers to other texts are passed over.
  """
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or row.keys().isdisjoint(_ANSWER_FIELDS):
    return None
  return row if row.get('text', text) == text else None


def _pass_on(pipe: TextIO, lines: queue.SimpleQueue[str | None]) -> None:
  """Puts the lines of a pipe into a queue, and None after the last one."""
  with pipe:
    for line in pipe:
      lines.put(line)
  lines.put(None)


class Process:
  """One process that answers texts, started anew where it dies."""

  def __init__(self, command: Sequence[str], env: dict[str, str]):
    self._command, self._env = command, env
    self._process: subprocess.Popen[str] | None = None
    self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    self._answered = self._late = False
    self._deaths = 0
    self.reason = ''

  def _start(self) -> subprocess.Popen[str]:
    self._answered = False
    process = subprocess.Popen(
        self._command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding='utf-8',
        errors='replace',
        env={**os.environ, **self._env},
        start_new_session=True,  # so that its children end with it
    )
    self._lines = queue.SimpleQueue()
    # Whatever holds the pipe open, nobody waits for more than the queue.
    arguments = process.stdout, self._lines
    threading.Thread(target=_pass_on, args=arguments, daemon=True).start()
    return process

  def _await(self, text: str, seconds: float) -> dict[str, Any] | None:
    """The next line that answers; None at the end or when time is up."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
      try:
        line = self._lines.get(timeout=left)
      except queue.Empty:
        break
      if line is None:
        return None
      if (answer := _answer(line, text)) is not None:
        return answer
    self._late = True
    return None

  def _give_up(self, process: subprocess.Popen[str]) -> None:
    self._late = True
    _kill_group(process)

  def _send(self, process: subprocess.Popen[str], text: str) -> None:
    while not self._lines.empty():  # what it said after its last answer
      if self._lines.get() is None:
        self._lines.put(None)
        break
    try:
      process.stdin.write(json.dumps({'text': text}) + '\n')
      process.stdin.flush()
    except OSError:
      pass  # it has closed its end, and its lines end too

  def _exchange(self, text: str) -> dict[str, Any] | None:
    """The answer to one text; None if the process dies or has to be killed."""
    try:
      self._process = process = self._process or self._start()
    except OSError as error:
      self.reason = f'does not start: {error}'
      return None
    seconds = ANSWER_SECONDS if self._answered else START_SECONDS
    self._late = False
    # One that reads nothing may fill its pipe: killed, it ends that too.
    timer = threading.Timer(seconds, self._give_up, [process])
    timer.start()
    try:
      self._send(process, text)
      answer = self._await(text, seconds)
    finally:
      timer.cancel()
    if answer is not None:
      self._answered = True
      return answer
    if self._late:
      _kill_group(process)
    code = self.close()
    late = f'gave no answer in {seconds:.0f} s'
    self.reason = late if self._late else f'ended with exit code {code}'
    return None

  def ask(self, text: str) -> dict[str, Any] | None:
    """The answer to one text, of a second process if the first one dies."""
    for _ in range(2):
      if self.given_up:
        return None
      if (answer := self._exchange(text)) is not None:
        self._deaths = 0
        return answer
      self._deaths += 1
      if self._late:  # it would be late again
        return None
    return None

  @property
  def given_up(self) -> bool:
    """Whether it is not started again."""
    return self._deaths >= MAX_DEATHS

  def kill(self) -> None:
    """Ends the process at once, and for good."""
    self._deaths = MAX_DEATHS
    if (process := self._process) is not None:
      _kill_group(process)

  def close(self) -> int | None:
    """Ends the process; its exit code."""
    process, self._process = self._process, None
    if process is None:
      return None
    try:
      process.stdin.close()  # which ends one that reads to the end
    except OSError:
      pass
    try:
      process.wait(1.0)
    except subprocess.TimeoutExpired:
      _kill_group(process)
    return process.wait()
