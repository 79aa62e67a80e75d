"""Responses -> the rows that a user reads; best of N."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ma_rlhf_jax.generation.responses import Response

# What a row may hold beside `prompt` and the fields it came with.
FIELDS = (
    'response',
    'response_ids',
    'num_tokens',
    'logprob',
    'sample',
    'score',
    'scores',
)


class Collector:
  """Holds responses back until all of a prompt are there."""

  def __init__(self, num_samples: int):
    """Nothing has come yet; each prompt gets `num_samples` responses."""
    self._num_samples = num_samples
    self._waiting: dict[int, list[Response]] = {}

  def add(self, batch: Iterable[Response]) -> list[list[Response]]:
    """The prompts that are now complete: the responses to each, by sample."""
    complete = []
    for response in batch:
      group = self._waiting.setdefault(response.row, [])
      group.append(response)
      if len(group) == self._num_samples:
        del self._waiting[response.row]
        complete.append(sorted(group, key=lambda r: r.sample))
    return complete


def best(responses: Sequence[Response]) -> Response:
  """The one with the highest score; the first of equals."""
  return max(responses, key=lambda response: response.score)


def rows(
    given: Mapping[str, Any],
    responses: Sequence[Response],
    spell: Callable[[Sequence[int]], str],
) -> list[dict[str, Any]]:
  """The output of one prompt.

  Args:
    given: the row of the prompt; its fields stay, but for `FIELDS`.
    responses: to it, by sample.
    spell: ids -> text.

  Returns:
    With scores one row, the best, with `score`, and `scores` of all samples
    where there are several. Without, a row each, with `sample` where there are
    several.
  """
  several = len(responses) > 1
  kept = {name: x for name, x in given.items() if name not in FIELDS}
  if responses[0].score is None:
    return [
        {
            **kept,
            **_fields(response, spell),
            **({'sample': response.sample} if several else {}),
        }
        for response in responses
    ]
  chosen = best(responses)
  row = {**kept, **_fields(chosen, spell), 'score': chosen.score}
  if several:
    row['scores'] = [response.score for response in responses]
  return [row]


def _fields(
    response: Response, spell: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
  return {
      'response': spell(response.ids),
      'response_ids': response.ids,
      'num_tokens': len(response.ids),
      'logprob': response.logprob,
  }


def replaced(given: Iterable[Mapping[str, Any]]) -> list[str]:
  """The fields of the input that the output does not keep."""
  names = {name for row in given for name in row}
  return [name for name in FIELDS if name in names]
