"""Rewards by functions of the user's own: their terms, sums and faults."""

from collections.abc import Callable
import pathlib
from typing import Any

from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax import validation
from ma_rlhf_jax.scorers import functions
from tests import tiny

_MODULE = """
def length(prompts, responses, rows):
  return [len(response) for response in responses]

def copied(prompts, responses, rows):
  return [float(r == row['chosen']) for r, row in zip(responses, rows)]

def fails(prompts, responses, rows):
  raise KeyError('absent')
"""
_TEXTS = (
    ['p', 'q'],
    ['one', 'three'],
    [{'chosen': 'one', 'rejected': 'x'}, {'chosen': 'two', 'rejected': 'y'}],
)


@pytest.fixture(autouse=True)
def _own_module(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (tmp_path / 'own_rewards.py').write_text(_MODULE)
  monkeypatch.syspath_prepend(tmp_path)


def _config(reward: str) -> ConfigDict:
  return tiny.config(reward=reward)


def _made(function: Callable[..., Any]) -> functions.TextReward:
  return functions.TextReward((('own:function', function),))


def test_functions_are_added() -> None:
  named = 'own_rewards:length+own_rewards:copied'
  reward = functions.TextReward.from_config(_config(named))
  # 3 + 1 and 5 + 0
  np.testing.assert_array_equal(reward(*_TEXTS), [4.0, 5.0])
  assert reward(*_TEXTS).dtype == np.float32


def test_the_model_is_a_term_of_its_own() -> None:
  assert functions.TextReward.from_config(_config('model')) is None
  assert functions.has_model(_config('model + own_rewards:length'))
  assert not functions.has_model(_config('own_rewards:length'))
  both = functions.TextReward.from_config(_config('model+own_rewards:length'))
  np.testing.assert_array_equal(both(*_TEXTS), [3.0, 5.0])


@pytest.mark.parametrize(
    ('reward', 'words'),
    [
        ('other', "reward='other' must be one of model"),
        ('own_rewards:absent', "has no function 'absent'"),
        ('no_such:function', "no module 'no_such'"),
        ('model+model', 'names a term twice'),
        ('model+', "reward='' must be one of model"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_start(
    reward: str, words: str
) -> None:
  assert words in '\n'.join(validation.problems(_config(reward)))
  assert validation.problems(_config('model+own_rewards:length')) == []


@pytest.mark.parametrize(
    ('function', 'words'),
    [
        (lambda *_: [1.0], r'shape \(1,\) for 2 responses'),
        (lambda *_: 1.0, r'shape \(\) for 2 responses'),
        (
            lambda *_: [1.0, float('nan')],
            "gave nan for row 1 of 2, the response 'three'",
        ),
        (
            lambda *_: [float('inf'), 1.0],
            "gave inf for row 0 of 2, the response 'one'",
        ),
        (lambda *_: ['good', 'bad'], "reward='own:function' failed: ValueErr"),
        (lambda *_: None, r'shape \(\) for 2 responses'),
    ],
)
def test_what_is_no_number_a_row_ends_the_run_by_name(
    function: Callable[..., Any], words: str
) -> None:
  with pytest.raises(functions.RewardError, match=words):
    _made(function)(*_TEXTS)


def test_an_error_of_the_function_names_it() -> None:
  reward = functions.TextReward.from_config(_config('own_rewards:fails'))
  with pytest.raises(functions.RewardError, match='own_rewards:fails.*absent'):
    reward(*_TEXTS)
