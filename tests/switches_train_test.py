"""Every allowed pair of switch values trains; every other one is refused."""

import dataclasses
import itertools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import switches, validation
from ma_rlhf_jax.ppo.stage import PPO
from ma_rlhf_jax.structs import Models
from tests import pairs, tiny

_CONFIGS, _FORBIDDEN = pairs.covering_set()
_IN_CI = 12  # the rest is slow; the first hold the most pairs
_WORDS = [*switches.VARIANTS, *switches.CONTROLS]


@dataclasses.dataclass(frozen=True)
class _Words(tiny.Tokenizer):
  """Responses of words and lines, with an `if` and a comma now and then."""

  def decode(self, ids: list[int], **unused: Any) -> str:
    pieces = '~ . ^ a bc,  de fgh \n i ;  jk so  lm if x: n # ( op and'
    return ''.join((pieces.split(' ') * 2)[i] or ' ' for i in ids)


def _stage(config: Any, folder: pathlib.Path) -> PPO:
  run = tiny.run(folder, config, mesh=tiny.mesh(1, 1, 1), tokenizer=_Words())
  with_critic = config.ppo.baseline == 'critic'
  params = Models(
      policy=tiny.params('policy', 0),
      ref_policy=tiny.params('policy', 2),
      critic=tiny.params('scalar', 1) if with_critic else None,
      reward_model=tiny.params('scalar', 3),
  )
  # Where the results of a step lie, or the second would be compiled anew.
  replicated = NamedSharding(run.mesh, PartitionSpec())
  copy = lambda x: jax.device_put(jnp.array(x), replicated)
  params = jax.tree.map(copy, params)  # steps donate
  shapes = Models(*[tiny.SHAPE] * 4)
  if not with_critic:
    shapes = shapes._replace(critic=None)
  return PPO(run, shapes, params)


def _train(config: Any, folder: pathlib.Path) -> None:
  """Two steps: finite numbers, and every model has moved in both."""
  assert validation.problems(config) == []
  if config.macro.termination in ('sentences', 'clauses'):
    pytest.importorskip('tensorflow_text')
  stage = _stage(config, folder)
  states = stage.states
  before = np.asarray(states['policy'].params['embedding'])
  with jax.set_mesh(stage.run.mesh):
    for index in range(2):
      states, metrics = stage.step(states, index)
      metrics = {name: float(x) for name, x in metrics.items()}
      assert all(map(math.isfinite, metrics.values())), metrics
      after = np.asarray(states['policy'].params['embedding'])
      assert np.isfinite(after).all() and np.abs(after - before).max() > 0
      before = after
  c = config.ppo
  assert int(states['policy'].step) == 2 * c.ppo_epochs * c.minibatches
  assert ('critic' in states) == (c.baseline == 'critic')
  assert metrics['tokens'] > 0 and metrics['macro/length_mean'] >= 1
  if config.macro.max_len:
    assert metrics['macro/length_p95'] <= config.macro.max_len
  if config.macro.termination == 'fixed' and config.macro.ngram == 0:
    bounded = config.macro.max_len or config.macro.last_token_alone
    assert bounded or metrics['macro/per_response'] == 1


def _named(values: pairs.Values) -> Any:
  flat = pairs.PARSER | values
  return tiny.config(**{n.replace('.', '__'): v for n, v in flat.items()})


@pytest.mark.parametrize(
    'number',
    [
        pytest.param(i, marks=pytest.mark.slow if i >= _IN_CI else ())
        for i in range(len(_CONFIGS))
    ],
)
def test_a_config_of_the_covering_set_trains(
    number: int, tmp_path: pathlib.Path
) -> None:
  _train(_named(_CONFIGS[number]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('word', _WORDS)
def test_a_variant_or_control_trains(word: str, tmp_path: pathlib.Path) -> None:
  config = tiny.config(ppo__batch_size=8)
  _train(config_lib.apply_arguments(config, word), tmp_path)


def test_the_covering_set_holds_every_pair_or_a_reason_against_it() -> None:
  held = set().union(*map(pairs.pairs_of, _CONFIGS))
  count = 0
  for one, two in itertools.combinations(pairs.SWITCHES, 2):
    for a, b in itertools.product(pairs.SWITCHES[one], pairs.SWITCHES[two]):
      pair = (one, a), (two, b)
      assert (pair in held) != (pair in _FORBIDDEN), pair
      count += 1
  assert count == len(held | _FORBIDDEN) and len(_CONFIGS) >= 50
  for pair in _FORBIDDEN:
    assert not pairs.allowed(dict(pair)), pair


class _Seen(dict):
  """A dict that remembers which of its keys were asked for."""

  def __init__(self, values: dict):
    super().__init__(values)
    self.seen = set()

  def __getitem__(self, key: str) -> Any:
    self.seen.add(key)
    return super().__getitem__(key)


def test_the_full_product_of_switches_is_judged() -> None:
  """Accepted, or refused with a message that names a field and its value.

  The product is over the switches that some rule reads; no other can change
  the answer.
  """
  flat = _Seen(config_lib.flatten(config_lib.base()) | pairs.PARSER)
  table = pairs.SWITCHES | {'macro.variant': tuple(switches.VARIANTS)}
  for values in ({}, *_CONFIGS, {'macro.empty_step': True}):
    flat.update(values)
    switches.problems(flat)
  read = [name for name in table if name in flat.seen]
  assert len(read) >= 15 and 'ppo.loss_reduction' not in read
  # One value stands for all that no rule names.
  table = table | {'macro.termination': ('fixed', 'parsing', 'ppl')}
  plain = dict(flat)
  accepted = refused = 0
  for values in itertools.product(*(table[name] for name in read)):
    plain.update(zip(read, values, strict=True))
    if found := switches.problems(plain):
      refused += 1
      if refused % 1000 == 1:
        assert all('=' in line and '.' in line for line in found)
    else:
      accepted += 1
  assert accepted > 1000 and refused > 1000
