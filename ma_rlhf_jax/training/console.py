"""What a training stage shows on the terminal: progress and sample tables."""

from collections.abc import Callable, Mapping, Sequence
import re
import sys
import time
from typing import Any, TextIO
import unicodedata

import tqdm

# CSI sequences (colours, cursor), OSC sequences (titles, links), other escapes.
_ANSI = re.compile(
    r'\x1b\[[0-?]*[ -/]*[@-~]|\x1b\].*?(?:\x07|\x1b\\|$)|\x1b.?|'
    r'\x9b[0-?]*[ -/]*[@-~]',
    re.DOTALL,
)
_NEWLINE = re.compile('\r\n|[\n\r\v\f\x85\u2028\u2029]')


class Progress:
  """A bar with tokens per second and time left; a context manager.

  Where the stream is no terminal, a plain line from time to time instead, so
  that log files stay readable. Rates count the updates of this start after its
  first, which compiles; evaluations and saves do not count.
  """

  def __init__(
      self,
      stage: str,
      total: int,
      initial: int = 0,
      *,
      seconds: float = 30.0,
      silent: bool = False,
      stream: TextIO | None = None,
      clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """Shows nothing yet.

    Args:
      stage: the name to show.
      total: updates of the stage.
      initial: updates that earlier starts have done.
      seconds: at least so long between two plain lines.
      silent: show nothing, on a process whose rates nobody needs.
      stream: default stderr.
      clock: seconds, for tests.
    """
    self._stage, self._total = stage, total
    self._seconds, self._clock = seconds, clock
    self._stream = stream or sys.stderr
    self._first: int | None = None  # step of the first update, which compiles
    self._tokens, self._passed = 0, 0.0  # of the updates after it
    self._printed = -float('inf')
    self._bar, self._silent = None, silent
    if self._stream.isatty() and not silent:
      self._bar = tqdm.tqdm(
          total=total,
          initial=initial,
          desc=stage,
          file=self._stream,
          dynamic_ncols=True,
          bar_format='{desc} {n_fmt}/{total_fmt} |{bar:20}| {postfix}',
      )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def update(
      self,
      step: int,
      tokens: int,
      seconds: float,
      shown: Mapping[str, float] | None = None,
  ) -> None:
    """Shows that `step` updates are done.

    Args:
      step: updates done, those of earlier starts included.
      tokens: real tokens of this update.
      seconds: it took.
      shown: values to show, in this order.
    """
    now = self._clock()
    if self._first is None:
      self._first = step
    else:
      self._tokens += tokens
      self._passed += seconds
    text = self._describe(step, shown or {})
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
    elif step >= self._total or now - self._printed >= self._seconds:
      self._printed = now
      self.message(f'{self._stage} {step}/{self._total}  {text}')

  def message(self, text: str) -> None:
    """Prints lines without tearing the bar."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    elif not self._silent:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()

  def _describe(self, step: int, shown: Mapping[str, float]) -> str:
    words = [f'{name}={value:.4g}' for name, value in shown.items()]
    if step > self._first and self._passed > 0:
      rate = self._tokens / self._passed
      each = self._passed / (step - self._first)
      left = each * max(0, self._total - step)
      words = [f'{_si(rate)} tokens/s', f'{_hours(left)} left', *words]
    return '  '.join(words)


def _si(value: float) -> str:
  """Three digits with k or M: 950, 12.3k, 4.56M."""
  for unit, size in (('M', 1e6), ('k', 1e3)):
    if value >= size:
      return f'{value / size:#.3g}'.rstrip('.') + unit
  return f'{value:.0f}'


def _hours(seconds: float) -> str:
  """1:02:03, or 02:03 below an hour."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  head = f'{hours}:' if hours else ''
  return f'{head}{minutes:02d}:{rest:02d}'


def one_line(text: str) -> str:
  """`text` as harmless single line: no escapes or controls, ⏎ for newlines."""
  text = _NEWLINE.sub('⏎', _ANSI.sub('', text)).replace('\t', ' ')
  # Cc controls, Cf invisible and direction marks, Cs lone surrogates.
  return ''.join(
      c for c in text if unicodedata.category(c) not in ('Cc', 'Cf', 'Cs')
  )


def samples_table(
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    width: int = 100,
) -> str:
  """A table of sampled responses, one line each.

  Prompts are cut at their start and responses at their end, each to half of
  what the other columns leave of `width`.

  Args:
    prompts: text.
    responses: text, as long as `prompts`.
    columns: numbers or texts by title; floats get three decimals.
    width: characters of a line; each text keeps at least 10.

  Raises:
    ValueError: if the columns differ in length.
  """
  lengths = {k: len(v) for k, v in columns.items()}
  lengths |= {'prompt': len(prompts), 'response': len(responses)}
  if len(set(lengths.values())) > 1:
    raise ValueError(f'columns of a table differ in length: {lengths}')
  right = []
  for title, values in columns.items():
    texts = [title, *(_cell(value) for value in values)]
    size = max(map(len, texts))
    right.append([text.rjust(size) for text in texts])
  used = sum(len(column[0]) + 2 for column in right)
  room = max(10, (width - used - 2) // 2)
  left = [_cut_start(one_line(text), room) for text in prompts]
  middle = [_cut_end(one_line(text), room) for text in responses]
  table = zip(['prompt', *left], ['response', *middle], *right, strict=True)
  return '\n'.join(
      '  '.join([row[0].ljust(room), row[1].ljust(room), *row[2:]])
      for row in table
  )


def _cell(value: Any) -> str:
  return f'{value:.3f}' if isinstance(value, float) else one_line(str(value))


def _cut_start(text: str, room: int) -> str:
  return text if len(text) <= room else '…' + text[-(room - 1) :]


def _cut_end(text: str, room: int) -> str:
  return text if len(text) <= room else text[: room - 1] + '…'
