"""Termination rules that read the text of a response, on the host.

  tokens, mask -> text -> trees or offsets -> starts

`parsing` takes the trees from macro.parser, see `parsers`. What it fails at
falls back and counts as `macro/fallback`.
"""

import collections
from collections.abc import Sequence
import dataclasses
from typing import TYPE_CHECKING, Self

import jax.numpy as jnp
import numpy as np

from ma_rlhf_jax.macro import parsers, parsing, text_rules
from ma_rlhf_jax.macro import spelling as spelling_lib
from ma_rlhf_jax.macro.parsing import Parsed
from ma_rlhf_jax.structs import Array

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

NAMES = ('parsing', *text_rules.RULES)
FALLBACKS = ('fixed', 'one')

# Responses whose starts are kept: 33 MB at 512 tokens each.
CACHE_SIZE = 65_536


@dataclasses.dataclass(frozen=True)
class HostSettings:
  """What is fixed for a run: fields of `macro`, see `config_fields`."""

  termination: str
  parser: str
  parse_cutoff: int
  parse_fallback: str
  parse_workers: int
  ngram: int


def metrics(counts_B: dict[str, Array]) -> dict[str, Array]:
  """What a batch's counts, see `HostTermination`, amount to.

  Returns:
    Of `parsing` `macro/sentences`, the mean of a response, and
    `macro/fallback`, the share of them that fell back.
  """
  if not counts_B:
    return {}
  sentences, fallbacks = (
      jnp.sum(counts_B[name]) for name in ('sentences', 'fallbacks')
  )
  return {
      'macro/sentences': jnp.mean(counts_B['sentences']),
      'macro/fallback': fallbacks / jnp.maximum(sentences, 1),
  }


class HostTermination:
  """Says which tokens of a batch open a macro action, by their text.

  Args:
    settings: the rule and what it needs.
    tokenizer: of the responses; see `macro.spelling.Speller`.

  Raises:
    ValueError, ImportError, OSError: if the parser, its file or the tokenizer
      does not serve, or tensorflow-text is missing.
  """

  def __init__(
      self, settings: HostSettings, tokenizer: 'PreTrainedTokenizerBase'
  ):
    self._settings = settings
    self._speller = spelling_lib.Speller(tokenizer)
    self._kept: collections.OrderedDict[bytes, Parsed] = (
        collections.OrderedDict()
    )
    self._parser: parsers.Parser | None = None
    if settings.termination == 'parsing':
      self._parser = parsers.make(settings.parser, settings.parse_workers)
    else:
      text_rules.check(settings.termination)

  def _segment(self, rows: Sequence[np.ndarray]) -> list[Parsed]:
    """The macro actions of responses that are not known yet."""
    spellings = [self._speller(row) for row in rows]
    texts = [spelling.text for spelling in spellings]
    if self._parser is None:
      offsets = text_rules.RULES[self._settings.termination](texts)
      return [
          Parsed(spelling_lib.starts(spelling, boundaries), 0, 0)
          for spelling, boundaries in zip(spellings, offsets, strict=True)
      ]
    # Without a word there is no sentence.
    asked = [text for text in dict.fromkeys(texts) if text.strip()]
    trees = dict(zip(asked, self._parser(asked), strict=True)) if asked else {}
    return [
        parsing.segment(
            spelling,
            trees.get(spelling.text, ()),
            cutoff=self._settings.parse_cutoff,
            fallback=self._settings.parse_fallback,
            ngram=self._settings.ngram,
        )
        for spelling in spellings
    ]

  def _lookup(self, rows: Sequence[np.ndarray]) -> list[Parsed]:
    """The macro actions of each response; each new one is computed once."""
    keys = [row.tobytes() for row in rows]
    new = {k: r for k, r in zip(keys, rows, strict=True) if k not in self._kept}
    if new:
      made = self._segment(list(new.values()))
      self._kept.update(zip(new, made, strict=True))
    found = [self._kept[key] for key in keys]
    for key in keys:
      self._kept.move_to_end(key)
    while len(self._kept) > CACHE_SIZE:
      self._kept.popitem(last=False)
    return found

  def __call__(
      self, tokens_BT: np.ndarray, mask_BT: np.ndarray
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The starts of a batch, each row on its own.

    Args:
      tokens_BT: int, token ids; anything on padding.
      mask_BT: bool, true on real response tokens.

    Returns:
      bool [B, T], true where a macro action opens, false on padding; and of
      `parsing` int32 [B]: the `sentences` of each response, and `fallbacks`,
      how many of them fell back.
    """
    mask_BT = np.asarray(mask_BT, bool)
    tokens_BT = np.asarray(tokens_BT, np.int32)
    rows = [row[mask] for row, mask in zip(tokens_BT, mask_BT, strict=True)]
    parsed = self._lookup(rows)
    starts_BT = np.zeros(mask_BT.shape, bool)
    starts_BT[mask_BT] = np.concatenate(
        [np.zeros(0, bool), *(p.starts for p in parsed)]
    )
    if self._parser is None:
      return starts_BT, {}
    return starts_BT, {
        'sentences': np.asarray([p.sentences for p in parsed], np.int32),
        'fallbacks': np.asarray([p.fallbacks for p in parsed], np.int32),
    }

  def close(self) -> None:
    """Ends the processes of the parser."""
    if self._parser is not None:
      self._parser.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()
