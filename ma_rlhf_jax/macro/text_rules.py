"""Where the text of a response breaks: sentences, clauses, lines of Python.

Each rule gives, for each text, the offsets of the characters at which a macro
action may open, ascending. Which tokens those are: `macro.spelling.starts`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import io
import os
import re
import tokenize
from typing import Any
import warnings

import numpy as np

# Marks that close what a sentence end stands in: `He said "Stop." Then`.
_MARKS = '"\'”’»)]}'
_CLOSING = re.compile(rf'[{re.escape(_MARKS)}]+(?=\s)')
# What stands before a name or an example, not at an end.
_ABBREVIATION = re.compile(r'\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e)\.\s*$')
_LINE = re.compile(r'^[^\S\n]*(?=\S)', re.MULTILINE)
_FENCE = re.compile(r'^ {0,3}(?:```|~~~).*$', re.MULTILINE)
# RE2. A comma or colon within a number or an address is none of these.
_AFTER = r'[,;:]["\')\]”’»]*\s+|\s*(?:—|---?)\s*|\s[-–]\s+'
# Without `as`, `for`, `that` and the like, which are mostly something else.
_BEFORE = (
    r'(?i)\s(?:and|but|or|nor|yet|so|because|although|though|whereas|while|'
    r'unless|until|if|when|whenever|where|wherever|since|after|before|once|'
    r'who|whom|whose|which)\b'
)


@functools.cache
def _tensorflow_text() -> Any:
  """The module, on the CPU."""
  # Says at every import that it has found no GPU.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  import tensorflow
  import tensorflow_text

  # It would take the memory of the accelerator.
  tensorflow.config.set_visible_devices([], 'GPU')
  return tensorflow_text


def _characters(text: str, offsets: Iterable[int]) -> list[int]:
  """Offsets of characters from offsets of bytes."""
  if text.isascii():
    return list(offsets)
  values = np.frombuffer(text.encode(), np.uint8)
  before = np.append(0, np.cumsum((values & 0xC0) != 0x80))
  return [int(before[offset]) for offset in offsets]


def _lines(text: str) -> list[int]:
  """The first character of each line that holds one."""
  return [match.end() for match in _LINE.finditer(text)]


def _solid(text: str, offsets: Iterable[int]) -> list[int]:
  """Each offset, or the next character that is not blank; in order, once."""
  found = set()
  for offset in offsets:
    rest = text[offset:]
    offset += len(rest) - len(rest.lstrip())
    if offset < len(text):
      found.add(offset)
  return sorted(found)


def _sentence_end(text: str, offset: int) -> int | None:
  """Where the sentence that is said to begin at `offset` does; None = nowhere.

  Closing quotes and brackets belong to the sentence before, which goes on if a
  small letter follows them. Without white space it is a number or an
  abbreviation: `3.5`, `e.g.`; Chinese and Japanese need none.
  """
  if _ABBREVIATION.search(text, max(offset - 20, 0), offset):
    return None
  if offset and not text[offset - 1].isspace():
    if closing := _CLOSING.match(text, offset):
      offset = closing.end()
    elif text[offset - 1].isascii():
      return None
  before, after = text[:offset].rstrip()[-1:], text[offset:].lstrip()[:1]
  return None if before in _MARKS and after.islower() else offset


def sentences(texts: Sequence[str]) -> list[list[int]]:
  """The first character of each sentence and of each line.

  Source: StateBasedSentenceBreaker of tensorflow-text; see `_sentence_end`.
  """
  if not texts:
    return []
  breaker = _tensorflow_text().StateBasedSentenceBreaker()
  _, begins, _ = breaker.break_sentences_with_offsets(list(texts))
  found = []
  for text, row in zip(texts, begins.to_list(), strict=True):
    ends = [_sentence_end(text, i) for i in _characters(text, row)]
    ends = [end for end in ends if end is not None]
    found.append(_solid(text, [*_lines(text), *ends]))
  return found


def clauses(texts: Sequence[str]) -> list[list[int]]:
  """The first character of each clause.

  A clause ends with its sentence, after a comma, semicolon, colon or dash, and
  before a conjunction: and, but, or, because, if, while, which, ...

  Source: RegexSplitter of tensorflow-text.
  """
  if not texts:
    return []
  splitter = _tensorflow_text().RegexSplitter
  # What follows the marks, and what the conjunctions follow.
  _, after, _ = splitter(_AFTER).split_with_offsets(list(texts))
  _, _, before = splitter(_BEFORE).split_with_offsets(list(texts))
  rows = zip(
      texts, sentences(texts), after.to_list(), before.to_list(), strict=True
  )
  return [
      _solid(text, [*ends, *_characters(text, [*after_row, *before_row])])
      for text, ends, after_row, before_row in rows
  ]


def _logical_lines(text: str) -> Iterator[int]:
  """The first character of each logical line, as long as it is Python.

  Where `tokenize` gives up, each of the physical lines from there on. What it
  accepts of a broken program differs between versions of Python.
  """
  # Same length; these two are not the same in all versions.
  text = text.replace('\r', ' ').replace('\0', ' ')
  line_at = [0, *(match.end() for match in re.finditer('\n', text))]
  depth, opens, last = 0, True, -1
  try:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
      offset = line_at[min(token.start[0], len(line_at)) - 1] + token.start[1]
      if token.type == tokenize.NEWLINE:
        opens, last = True, offset
      elif opens and token.string.strip():
        yield offset
        # A comment on its own stands before the line that opens next.
        opens, last = token.type == tokenize.COMMENT, offset
      if token.type == tokenize.OP:
        depth += (token.string in '([{') - (token.string in ')]}')
        depth = max(depth, 0)
        opens |= token.string == ';' and not depth
  except (tokenize.TokenError, SyntaxError):
    yield from (offset for offset in _lines(text) if offset > last)


def _python(text: str) -> list[int]:
  """The logical lines between the fences of a text, and the fences."""
  found, at = [], 0
  for fence in _FENCE.finditer(text):
    found += [at + i for i in _logical_lines(text[at : fence.start()])]
    found.append(fence.start())
    at = fence.end()
  found += [at + i for i in _logical_lines(text[at:])]
  return _solid(text, found)


def python(texts: Sequence[str]) -> list[list[int]]:
  """The first character of each logical line of Python.

  A semicolon outside of brackets ends one too, and a comment on its own line
  is one. Markdown fences are lines of their own; what stands between them is
  read on its own, so that prose before a program does not spoil it.
  """
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of the programs: `1and`, '\\}'
    return [_python(text) for text in texts]


RULES: dict[str, Callable[[Sequence[str]], list[list[int]]]] = {
    'sentences': sentences,
    'clauses': clauses,
    'python': python,
}


def check(name: str) -> None:
  """Raises ImportError if what the rule needs is not installed."""
  if name not in ('sentences', 'clauses'):
    return
  try:
    _tensorflow_text()
  except ImportError as error:
    raise ImportError(
        f'macro.termination={name!r} needs tensorflow-text: '
        "pip install -e '.[text]'"
    ) from error
