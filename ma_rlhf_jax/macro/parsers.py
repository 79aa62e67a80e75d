"""Parsers of the user: texts -> constituency trees, without fail.

`macro.parser` is one of

  module:function          called in this process, or in `parse_workers` of it
  trees.jsonl              rows {"text": ..., "trees": [bracketed or null, ...]}
  command: python parse.py {"text": ...} in, {"trees": [...]} out, line by line

Whatever a parser does, a run goes on: what it fails at is None. That is why it
has limits of time.
"""

from collections.abc import Sequence
from concurrent import futures
import contextlib
import importlib
import json
import os
import pathlib
import queue
import re
import shlex
import shutil
import sys
import threading
from typing import Any, Protocol

from absl import logging
from etils import epath

from ma_rlhf_jax import interrupts
from ma_rlhf_jax.macro import parsing
from ma_rlhf_jax.macro.parser_process import MAX_DEATHS, Process

_FUNCTION = re.compile(r'[A-Za-z_][\w.]*:[A-Za-z_]\w*')
_COMMAND = 'command:'
_TOOL = pathlib.Path(__file__).parents[1] / 'tools' / 'parse.py'
BATCH_SECONDS = 600.0  # limit of a function, for all texts of a batch
_FAILED = (None,)  # the trees of a text that was not parsed: one sentence

Trees = Sequence[Any]


class _Report:
  """Says once what a parser failed at."""

  def __init__(self, name: str):
    self._name, self._said = name, False

  def __call__(self, reason: str) -> None:
    if not self._said:
      self._said = True
      logging.warning(
          'macro.parser=%r failed: %s. What it fails at falls back and counts '
          'as macro/fallback; further failures are not reported.',
          self._name,
          reason,
      )


class Parser(Protocol):
  """Gives the trees of each text, without fail."""

  def __call__(self, texts: Sequence[str]) -> list[Trees]:
    ...

  def close(self) -> None:
    ...


class _FileParser:
  """Trees that were made before, by their text."""

  def __init__(self, path: str):
    self._trees: dict[str, Trees] = {}
    try:
      text = epath.Path(path).read_text()
    except OSError as error:
      raise OSError(f'macro.parser={path!r}: {error}') from error
    for number, line in enumerate(text.split('\n'), 1):
      if line.strip():
        self._add(line, f'macro.parser={path!r}: line {number}')

  def _add(self, line: str, where: str) -> None:
    try:
      row = json.loads(line)
    except ValueError as error:
      raise ValueError(f'{where} is not JSON: {error}') from error
    fields = row if isinstance(row, dict) else {}
    text, trees = fields.get('text'), fields.get('trees')
    if not isinstance(text, str) or not isinstance(trees, list):
      raise ValueError(
          f'{where} must be {{"text": "...", "trees": [...]}}; it is '
          f'{line[:80]!r}'
      )
    self._trees[text] = trees

  def __call__(self, texts: Sequence[str]) -> list[Trees]:
    return [self._trees.get(text, _FAILED) for text in texts]

  def close(self) -> None:
    pass


class _FunctionParser:
  """A function of the user, in a thread that may be left behind."""

  def __init__(self, name: str):
    self._report = _Report(name)
    self._thread: threading.Thread | None = None
    module, function = name.split(':')
    try:
      loaded = importlib.import_module(module)
    except ImportError as error:
      raise ImportError(f'macro.parser={name!r}: {error}') from error
    self._function = getattr(loaded, function, None)
    if not callable(self._function):
      raise ValueError(
          f'macro.parser={name!r}: {module} has no function {function!r}'
      )

  def _parse(self, texts: Sequence[str]) -> list[Trees]:
    answers = list(self._function(list(texts)))
    if len(answers) != len(texts):
      raise ValueError(f'{len(answers)} answers to {len(texts)} texts')
    for trees in answers:
      if isinstance(trees, str):
        raise ValueError('a string where a list of trees was needed')
    return [[parsing.read(tree) for tree in trees] for trees in answers]

  def _try(self, texts: Sequence[str]) -> list[Trees] | None:
    """The answers, or None once the user has been told why there are none."""
    box: list[Any] = []

    def work() -> None:
      try:
        box.append(self._parse(texts))
      # It is the user's code, which must never stop a run: what it fails at
      # falls back and is counted.
      except Exception as error:
        box.append(error)

    self._thread = threading.Thread(target=work, daemon=True)
    self._thread.start()
    self._thread.join(BATCH_SECONDS)
    result = (
        box[0] if box else TimeoutError(f'no answer in {BATCH_SECONDS:.0f} s')
    )
    if isinstance(result, list):
      return result
    self._report(repr(result))
    return None

  def __call__(self, texts: Sequence[str]) -> list[Trees]:
    if self._thread and self._thread.is_alive():  # it may not run twice
      return [_FAILED] * len(texts)
    answers = self._try(texts)
    if answers is not None:
      return answers
    if len(texts) == 1 or self._thread.is_alive():
      return [_FAILED] * len(texts)
    # One text may have spoilt them all.
    return [trees for text in texts for trees in self([text])]

  def close(self) -> None:
    pass


def _has_trees(answer: dict[str, Any] | None) -> bool:
  return answer is not None and isinstance(answer.get('trees'), list)


class _CommandParser:
  """Processes that answer JSON lines, each one text at a time."""

  def __init__(
      self, name: str, command: Sequence[str], workers: int, **env: str
  ):
    self._name, self._report = name, _Report(name)
    self._lock, self._left = threading.Lock(), workers
    if shutil.which(command[0]) is None:
      raise ValueError(
          f'macro.parser={name!r}: there is no program {command[0]!r}'
      )
    self._processes = [Process(command, env) for _ in range(workers)]
    self._idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
    for process in self._processes:
      self._idle.put(process)
    self._threads = futures.ThreadPoolExecutor(workers)
    self._interrupted = contextlib.ExitStack()
    self._interrupted.enter_context(interrupts.at_end(self._kill))
    # A wrong command fails here, and models are loaded side by side.
    answers = self._threads.map(lambda p: p.ask('A test.'), self._processes)
    if not all(_has_trees(answer) for answer in list(answers)):
      self.close()
      reasons = {p.reason or 'gives no trees' for p in self._processes}
      raise ValueError(
          f'macro.parser={name!r} {" and ".join(filter(None, reasons))}; for '
          'each line {"text": "..."} it must print one line {"trees": [...]}; '
          'its own messages stand above'
      )

  def _back(self, process: Process) -> None:
    """Puts a process back, unless it is given up and others are left.

    It would be idle at once, and take the texts that others could parse.
    """
    with self._lock:
      if process.given_up and self._left > 1:
        self._left -= 1
        logging.warning(
            'macro.parser=%r: of its processes, %d are left; one died or was '
            'late %d times in a row',
            self._name,
            self._left,
            MAX_DEATHS,
        )
        return
    self._idle.put(process)

  def _parse(self, text: str) -> Trees:
    process = self._idle.get()
    try:
      answer = process.ask(text)
    finally:
      self._back(process)
    if answer is None:
      self._report(process.reason)
    elif 'error' in answer or not _has_trees(answer):
      self._report(str(answer.get('error', f'answered {answer}'))[:500])
    return answer['trees'] if _has_trees(answer) else _FAILED

  def __call__(self, texts: Sequence[str]) -> list[Trees]:
    return list(self._threads.map(self._parse, texts))

  def close(self) -> None:
    """Ends the processes."""
    self._threads.shutdown()
    for process in self._processes:
      process.close()
    self._interrupted.close()

  def _kill(self) -> None:
    for process in self._processes:
      process.kill()


def make(name: str, workers: int) -> Parser:
  """The parser that `macro.parser` names; raises what is wrong with it."""
  if name.startswith(_COMMAND) and name.removeprefix(_COMMAND).strip():
    try:
      command = shlex.split(name.removeprefix(_COMMAND))
    except ValueError as error:
      raise ValueError(f'macro.parser={name!r}: {error}') from error
    return _CommandParser(name, command, max(workers, 1))
  if name.endswith('.jsonl'):
    return _FileParser(name)
  if not _FUNCTION.fullmatch(name):
    raise ValueError(
        f"macro.parser={name!r}: macro.termination='parsing' needs "
        "'module:function', a file of trees that ends in .jsonl, or "
        "'command: ...', such as 'command: python parse.py'"
    )
  if not workers:
    return _FunctionParser(name)
  command = [sys.executable, str(_TOOL), f'--parser={name}']
  # It finds the modules that this process finds.
  paths = os.pathsep.join(filter(None, sys.path))
  return _CommandParser(name, command, workers, PYTHONPATH=paths)
