"""The method in one file takes the updates that the PPO stage takes.

`ma_ppo.py` is written from the paper and shares no code with the package.
"""

from collections.abc import Iterable
import pathlib
from typing import Any

import numpy as np
import pytest

from tests.reference import ma_ppo
from tests.reference.sides import Update, by_package, by_reference
from tests.reference.variants import IN_CI, VARIANTS

# Of the largest entry of what is compared.
TOLERANCE = 1e-6

_PPL = 'perplexity of the old policy, own targets of the critic'
# Settings of the reference under which it must not agree: all that a variant
# says is seen by the comparison, and by no more than a little.
CONTROLS = [
    ('ours', {'gae_lambda': 0.949}),
    ('ours', {'gamma': 0.999}),
    ('ours', {'kl_coef': 0.0501}),
    ('ours', {'ngram': 4}),
    ('ours', {'pool_values': 'equal'}),
    ('ours', {'critic_target': 'macro'}),
    ('ours', {'advantage': 'own'}),
    ('ours', {'reduction': 'token'}),
    ('ours', {'decay': 0.101}),
    ('paper', {'ratio': 'token'}),
    ('paper', {'ratio': 'geometric'}),
    ('paper', {'reduction': 'token'}),
    ('paper', {'clip_eps': 0.21}),
    ('paper', {'value_clip_eps': 0.21}),
    ('authors', {'pool_rewards': 'sum'}),
    ('authors', {'empty_step': False}),
    ('authors', {'last_token_alone': False}),
    ('token_ppo', {'ngram': 2}),
    ('rloo', {'gamma': 0.91}),
    ('one_macro', {'ratio': 'token'}),
    ('given boundaries', {'pool_values': 'position'}),
    (_PPL, {'logprobs': 'reference'}),
    (_PPL, {'critic_target': 'macro'}),
    ('own advantages, discounted tokens', {'discount': 'decision'}),
    ('own advantages, discounted tokens', {'advantage': 'shared'}),
    (
        'a critic of starts, perplexity, discounted macro actions',
        {'critic_target': 'macro'},
    ),
    ('geometric ratio, constant divisor', {'ratio': 'token'}),
    ('geometric ratio, constant divisor', {'response_length': 9}),
    ('adaptive KL, whitened, clipped scores', {'kl_horizon': 51.0}),
    ('adaptive KL, whitened, clipped scores', {'whiten_advantages': False}),
    ('adaptive KL, whitened, clipped scores', {'score_clip': 0.11}),
]


def _differences(package: Update, reference: Update) -> dict[str, float]:
  """Of each part of an update, in `TOLERANCE`s; up to 1 they agree."""
  found = {}
  for field in Update._fields:
    ours, theirs = getattr(package, field), getattr(reference, field)
    if not isinstance(ours, dict):
      ours, theirs = {'': ours}, {'': theirs}
    assert ours.keys() == theirs.keys()
    for model, value in ours.items():
      assert np.shape(value) == np.shape(theirs[model])
      size = np.max(np.abs(theirs[model]))
      apart = np.max(np.abs(np.subtract(value, theirs[model])))
      found[f'{field} {model}'] = float(apart / size / TOLERANCE)
  return found


def _marked(cases: Iterable[Any], names: Iterable[str]) -> list[Any]:
  """The cases, slow where their variant does not run in CI."""
  return [
      pytest.param(case, id=str(case), marks=[pytest.mark.slow])
      if name not in IN_CI
      else pytest.param(case, id=str(case))
      for case, name in zip(cases, names, strict=True)
  ]


@pytest.mark.parametrize('name', _marked(VARIANTS, VARIANTS))
def test_it_takes_the_update_of_the_package(name: str) -> None:
  package = by_package(name)
  found = _differences(package, by_reference(name))
  assert max(found.values()) <= 1, found
  # Steps of about a learning rate: something was there to agree on.
  assert all(0.5 < np.max(np.abs(x)) < 10 for x in package.moves.values())


@pytest.mark.parametrize('case', _marked(CONTROLS, [c[0] for c in CONTROLS]))
def test_another_setting_does_not_agree(case: tuple[str, dict]) -> None:
  name, changed = case
  found = _differences(by_package(name), by_reference(name, **changed))
  assert max(found.values()) > 30, found


def test_it_is_one_short_file_without_the_package() -> None:
  source = pathlib.Path(ma_ppo.__file__).read_text()
  assert len(source.splitlines()) <= 250
  lines = [x.split() for x in source.splitlines()]
  imported = {x[1] for x in lines if x[:1] in (['import'], ['from'])}
  assert imported == {'collections.abc', 'dataclasses', 'numpy', 'torch'}
