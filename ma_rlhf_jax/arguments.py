"""Recipe arguments (`ngram=5`) that a word or a rule would leave unheard."""

from collections.abc import Mapping, Sequence
from typing import Any

# Field -> (the argument as it was written, its value).
Given = Mapping[str, tuple[str, Any]]

# Controls that are worked out from macro.ngram before they set it to 1.
_MATCHED = ('lambda_matched', 'kl_matched')
# Rules that read macro.ngram; parsing does where a sentence has no tree.
_OF_NGRAM = ('fixed', 'parsing')


class ArgumentError(ValueError):
  """What follows the colon of --config cannot be used."""


def kept(given: Given, words: Sequence[str]) -> dict[str, tuple[str, Any]]:
  """The arguments whose values no word may change.

  `ngram` is the n that some words match, so that they may.
  """
  matched = any(word in _MATCHED for word in words)
  return {
      field: entry
      for field, entry in given.items()
      if not (matched and field == 'macro.ngram')
  }


def check_ngram(given: Given, rule: str) -> None:
  """Raises ArgumentError where `ngram` is given to a rule that ignores it.

  Args:
    given: what arguments have set.
    rule: `macro.termination` in the end.
  """
  if 'macro.ngram' in given and rule not in _OF_NGRAM:
    raise ArgumentError(
        f'{given["macro.ngram"][0]} means nothing with macro.termination='
        f'{rule!r}, which reads no macro.ngram; leave one of them out'
    )
