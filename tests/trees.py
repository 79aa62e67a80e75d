"""A parser of texts for tests: each line a sentence, each word a leaf."""

from collections.abc import Sequence


def _tree(words: Sequence[str]) -> str:
  """Halves, halved again."""
  if len(words) == 1:
    return f'(W {words[0]})'
  half = len(words) // 2
  return f'(S {_tree(words[:half])} {_tree(words[half:])})'


def parse(texts: Sequence[str]) -> list[list[str | None]]:
  """Bracketed trees of each text; lines with brackets fail."""
  return [
      [
          None if set('()') & set(line) else _tree(line.split())
          for line in text.splitlines()
          if line.strip()
      ]
      for text in texts
  ]
