"""Rewards that read text: the terms of `config.reward`.

  --config.reward=model                        the reward model (default)
  --config.reward=my_rewards:politeness        a function instead of it
  --config.reward=model+my_rewards:politeness  their sum

A function takes the texts of some rows and gives one number for each:

  def politeness(prompts, responses, rows):
    return [response.count('please') for response in responses]

`rows` holds a dict for each: 'chosen' and 'rejected', the responses of the data
set. Each process scores the rows of its own devices. Runs resume exactly where
a function gives the same numbers for the same texts.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Self

from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import registry

# The term that is the reward model's score.
MODEL = 'model'
_TAKES = ('prompts', 'responses', 'rows')
Function = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence]


class RewardError(ValueError):
  """A reward function gave what cannot be used; the message names the row."""


def terms(reward: str) -> tuple[str, ...]:
  """The terms of `config.reward`."""
  return tuple(term.strip() for term in reward.split('+'))


def has_model(config: ConfigDict) -> bool:
  """Whether a term is the reward model's score."""
  return MODEL in terms(config.reward)


def problems(config: ConfigDict) -> list[str]:
  """What is wrong with the terms, one line each."""
  named = terms(config.reward)
  found = [registry.problem((MODEL,), term, 'reward', _TAKES) for term in named]
  if len(set(named)) < len(named):
    found.append(f'reward={config.reward!r} names a term twice')
  return [line for line in found if line]


@dataclasses.dataclass(frozen=True)
class TextReward:
  """The sum of the terms that are functions.

  Attributes:
    functions: by name.
  """

  functions: tuple[tuple[str, Function], ...]

  @classmethod
  def from_config(cls, config: ConfigDict) -> Self | None:
    """Those of a config; None where no term is a function.

    Raises:
      ValueError: where one cannot be loaded.
    """
    named = [term for term in terms(config.reward) if term != MODEL]
    found = tuple(
        (term, registry.load(term, 'reward', _TAKES)) for term in named
    )
    return cls(found) if found else None

  def __call__(
      self, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]
  ) -> np.ndarray:
    """float32 [B], reward-model units.

    Raises:
      RewardError: where a function fails, or gives anything but one finite
        number a row.
    """
    total = np.zeros(len(responses), np.float32)
    for name, function in self.functions:
      total += _scores(name, function, prompts, responses, rows)
    return total


def _scores(
    name: str,
    function: Function,
    prompts: list[str],
    responses: list[str],
    rows: list[dict[str, Any]],
) -> np.ndarray:
  # The function is the user's own code and may raise anything.
  try:
    found = np.asarray(function(prompts, responses, rows), np.float32)
  except Exception as error:
    kind = type(error).__name__
    raise RewardError(f'reward={name!r} failed: {kind}: {error}') from error
  if found.shape != (len(responses),):
    raise RewardError(
        f'reward={name!r} gave an array of shape {found.shape} for '
        f'{len(responses)} responses; it must give one number for each'
    )
  if not np.isfinite(found).all():
    row = int(np.argmin(np.isfinite(found)))
    raise RewardError(
        f'reward={name!r} gave {found[row]} for row {row} of '
        f'{len(responses)}, the response {responses[row][:80]!r}; it must be a '
        'finite number'
    )
  return found
