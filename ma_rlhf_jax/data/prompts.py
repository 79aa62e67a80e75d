"""Prompts to answer: rows of a JSONL file -> checked texts -> token ids."""

from collections.abc import Iterator, Sequence
import gzip
import json
import math
from typing import TYPE_CHECKING, Any
import zlib

from ma_rlhf_jax.data import tokenizer as tokenizer_lib

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# What is wrong is told of so many rows.
_SHOWN = 5


def text_problem(text: Any) -> str:
  """Why `text` cannot be a prompt; '' = it can."""
  if not isinstance(text, str):
    return f'is {json.dumps(text)[:80]}, not text'
  try:
    text.encode()
  except UnicodeEncodeError as error:
    return f'holds half a character (U+{ord(text[error.start]):04X})'
  return ''


def _not_finite(name: str) -> None:
  raise ValueError(f'holds {name}, which no JSON number can be')


def _finite(digits: str) -> float:
  value = float(digits)
  if math.isinf(value):
    raise ValueError(f'holds {digits[:40]}, beyond the largest float')
  return value


def parse_line(line: str) -> Any:
  """The JSON value of one line; ValueError says what is wrong with it.

  What comes of it can be written as JSON again: no nan, no infinity.
  """
  try:
    return json.loads(line, parse_constant=_not_finite, parse_float=_finite)
  except json.JSONDecodeError as error:
    where = f'{error.msg} at character {error.pos + 1}'
    raise ValueError(f'is no JSON: {where}') from None
  except RecursionError:
    raise ValueError('is nested too deeply') from None
  except ValueError as error:
    if 'integer string' not in str(error):
      raise
    raise ValueError('holds a whole number of too many digits') from None


def _row(line: bytes) -> dict[str, Any]:
  """The row of one line; ValueError says what is wrong with it."""
  try:
    text = line.decode('utf-8-sig').rstrip('\r\n')
  except UnicodeDecodeError as error:
    raise ValueError(f'is no UTF-8: {error.reason}') from None
  row = parse_line(text)
  if not isinstance(row, dict):
    raise ValueError('is no JSON object; write {"prompt": "..."}')
  if 'prompt' not in row:
    names = ', '.join(map(repr, row)) or 'nothing'
    raise ValueError(f"has no field 'prompt'; it has {names}")
  if problem := text_problem(row['prompt']):
    raise ValueError(f"'prompt' {problem}")
  return row


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
  """(number from 1, line) of each line that is not blank."""
  opener = gzip.open if path.endswith('.gz') else open
  try:
    with opener(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield number, line
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f'--input={path} is no whole gzip file: {error}') from None
  except OSError as error:
    raise OSError(
        f'--input={path} cannot be read: {error.strerror or error}'
    ) from error


def read_rows(path: str) -> tuple[list[dict[str, Any]], list[int]]:
  """The rows of a JSONL file, and the line number of each.

  Args:
    path: .jsonl, or .jsonl.gz; blank lines are skipped.

  Raises:
    OSError: if the file cannot be read.
    ValueError: if there is no row, or a row is no object with text in
      `prompt`; names the lines.
  """
  rows, numbers, problems = [], [], []
  for number, line in _lines(path):
    try:
      rows.append(_row(line))
      numbers.append(number)
    except ValueError as error:
      problems.append(f'line {number} {error}')
  if problems:
    raise ValueError(_listed(f'--input={path}', problems))
  if not rows:
    raise ValueError(
        f'--input={path} holds no row; write one JSON object a line, '
        '{"prompt": "..."}'
    )
  return rows, numbers


def _listed(where: str, problems: Sequence[str], fix: str = '') -> str:
  """One line for one problem, else a list of the first of them."""
  if len(problems) == 1:
    return '; '.join(filter(None, [f'{where}: {problems[0]}', fix]))
  shown = list(problems[:_SHOWN])
  if more := len(problems) - len(shown):
    shown.append(f'and {more} more')
  return '\n  '.join(filter(None, [f'{where}:', *shown, fix]))


def encode(
    tokenizer: 'PreTrainedTokenizerBase', texts: Sequence[str]
) -> list[list[int]]:
  """BOS and the ids of each text; what looks like a special token is text."""
  ids = tokenizer_lib.encode_batch(tokenizer, texts)
  return [[tokenizer.bos_token_id, *row] for row in ids]


def check_lengths(
    where: str, names: Sequence[str], lengths: Sequence[int], limit: int
) -> None:
  """Raises where a prompt is longer than `limit` tokens.

  Args:
    where: the prompts come from.
    names: of the prompts, 'line 3'.
    lengths: tokens of each, BOS included.
    limit: --max_prompt_len.

  Raises:
    ValueError: names each prompt that is too long, and its length.
  """
  problems = [
      f'{name} has {length} tokens (BOS included), more than '
      f'--max_prompt_len={limit}'
      for name, length in zip(names, lengths, strict=True)
      if length > limit
  ]
  if problems:
    fix = 'shorten it, or raise --max_prompt_len (or lower --max_new_tokens)'
    raise ValueError(_listed(where, problems, fix))
