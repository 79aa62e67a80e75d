"""Configs that between them hold every allowed pair of switch values."""

import functools
import itertools
import random
from typing import Any

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import switches
from ma_rlhf_jax.config_fields import FIELDS

Values = dict[str, Any]

_BOOLEAN = (False, True)
# Every value of every switch that changes what a PPO step computes.
SWITCHES: dict[str, tuple[Any, ...]] = {
    **{
        name: FIELDS[name].choices
        for name in (
            'macro.termination',
            'macro.random_leftover',
            'macro.logprobs',
            'macro.reward',
            'macro.value',
            'ppo.discount',
            'ppo.advantage',
            'ppo.baseline',
            'ppo.ratio',
            'ppo.loss_reduction',
            'critic.target',
        )
    },
    'macro.ngram': (3, 1, 0),
    'macro.min_len': (1, 2),
    'macro.max_len': (0, 4),
    'macro.last_token_alone': _BOOLEAN,
    'macro.empty_step': _BOOLEAN,
    'ppo.gamma': (1.0, 0.9),
    'ppo.gae_lambda': (0.95, 1.0),
    'ppo.whiten_advantages': _BOOLEAN,
    'ppo.kl_target': (0.0, 2.0),
    'ppo.logprob_temperature': (0.0, 1.5),
    'ppo.samples_per_prompt': (1, 2),
    'ppo.ppo_epochs': (1, 2),
    'ppo.minibatches': (1, 2),
    'critic.gae_lambda': (-1.0, 0.5),
}
PARSER = {'macro.parser': 'tests.trees:parse'}
_BASE = config_lib.flatten(config_lib.base()) | PARSER


def allowed(values: Values) -> bool:
  """Whether the switches accept these values on top of `base()`."""
  return not switches.problems(_BASE | values)


def pairs_of(values: Values) -> set[tuple]:
  """Every two settings of a config."""
  return set(itertools.combinations(values.items(), 2))


def _draw(random_: random.Random, fixed: Values, tries: int) -> Values | None:
  """A random allowed config that holds `fixed`, or None."""
  for _ in range(tries):
    values = {name: random_.choice(all_) for name, all_ in SWITCHES.items()}
    if allowed(values | fixed):
      return values | fixed
  return None


@functools.cache
def covering_set() -> tuple[tuple[Values, ...], frozenset]:
  """(configs, pairs that no config may hold); the same at every call.

  Each config is, of some random ones, the one that holds most pairs not yet
  held. What is left at the end is looked for pair by pair.
  """
  random_ = random.Random(0)
  missing = set()
  for one, two in itertools.combinations(SWITCHES, 2):
    for values in itertools.product(SWITCHES[one], SWITCHES[two]):
      missing.add(((one, values[0]), (two, values[1])))
  chosen, forbidden = [], set()
  while missing:
    # Most configs hold one pair from the list on purpose, or none will.
    goal = random_.choice(sorted(missing, key=repr))
    drawn = [_draw(random_, dict(goal), 60) for _ in range(30)]
    drawn = [d for d in drawn if d] or [_draw(random_, dict(goal), 20_000)]
    if drawn == [None]:
      forbidden.add(goal)
      missing.discard(goal)
      continue
    best = max(drawn, key=lambda d: len(pairs_of(d) & missing))
    chosen.append(best)
    missing -= pairs_of(best)
  return tuple(chosen), frozenset(forbidden)
