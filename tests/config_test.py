"""Recipe arguments, flat configs and their hash, and sizes from a config."""

import hashlib
import json

import ml_collections
from ml_collections import ConfigDict
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.config import (
    apply_arguments,
    base,
    differences,
    fingerprint,
    flatten,
    lengths,
    num_steps,
)


def test_base_is_locked_and_made_anew_each_time() -> None:
  config = base()
  config.ppo.kl_coef = 0.125
  assert base().ppo.kl_coef == 0.05  # paper
  with pytest.raises(AttributeError):
    config.ppo.kl_coeff = 0.25
  with pytest.raises(TypeError):
    config.ppo.kl_coef = 'much'


@pytest.mark.parametrize(
    'arguments, ngram, seed, termination',
    [
        ('', 5, 0, 'fixed'),
        (None, 5, 0, 'fixed'),
        ('ngram=1', 1, 0, 'fixed'),
        ('seed=7,ngram=0', 0, 7, 'fixed'),
        ('termination=ppl,', 5, 0, 'ppl'),
    ],
)
def test_recipe_arguments_set_their_fields(
    arguments: str | None, ngram: int, seed: int, termination: str
) -> None:
  config = apply_arguments(base(), arguments)
  found = config.macro.ngram, config.seed, config.macro.termination
  assert found == (ngram, seed, termination)


@pytest.mark.parametrize(
    'arguments, words',
    [
        ('n=1', "'n' is unknown; known are ngram, seed, termination"),
        ('ngram=1,lr=2', "'lr' is unknown"),
        ('ngram=one', "'ngram=one': 'one' is not of type int"),
        ('ngram', "'ngram': '' is not of type int; write for example ngram=5"),
    ],
)
def test_a_wrong_recipe_argument_is_named(arguments: str, words: str) -> None:
  with pytest.raises(ValueError) as caught:
    apply_arguments(base(), arguments)
  assert words in str(caught.value)


def _small(**extra: object) -> ConfigDict:
  """A config whose fields do not stand in the order of their names."""
  return ConfigDict({'z': 0.5, 'b': {'y': (1, 2), 'a': 'x'}, **extra})


def test_flatten_sorts_the_names_and_makes_lists_of_tuples() -> None:
  flat = flatten(_small())
  assert list(flat.items()) == [('b.a', 'x'), ('b.y', [1, 2]), ('z', 0.5)]
  assert json.loads(json.dumps(flatten(base()))) == flatten(base())


def test_the_fingerprint_is_of_names_and_values_in_order() -> None:
  text = b'{"b.a": "x", "b.y": [1, 2], "z": 0.5}'
  want = hashlib.sha256(text).hexdigest()
  assert fingerprint(_small()) == want
  swapped = ConfigDict({'b': {'a': 'x', 'y': (1, 2)}, 'z': 0.5})
  assert fingerprint(swapped) == want
  assert fingerprint(_small(c=1)) != want


def test_differences_are_named_with_both_values() -> None:
  stored = flatten(base())
  config = base()
  assert differences(stored, config) == []
  config.ppo.kl_coef = 0.125
  config.macro.random_lengths = (2, 4)
  stored['data.gone'] = 3
  assert differences(stored, config) == [
      'data.gone: stored 3, now None',
      'macro.random_lengths: stored [2, 3, 5, 10], now [2, 4]',
      'ppo.kl_coef: stored 0.05, now 0.125',
  ]


def test_resumable_fields_do_not_differ() -> None:
  stored, config = flatten(base()), base()
  config.stages = ('ppo',)
  config.log.every = 9
  config.log.sinks = ()
  config.checkpoint.every = 7
  config.export.which = 'best'
  config.evaluate.prompts = 11
  config.mesh.fsdp = 2
  config.profile.steps = (1, 2)
  config.model.remat = 'none'
  config.model.logprob_chunk = 64
  config.data.cache_dir = 'elsewhere'
  assert differences(stored, config) == []
  config.model.num_layers = 3
  assert differences(stored, config) == ['model.num_layers: stored 2, now 3']


def test_a_field_newer_than_the_run_has_had_its_default() -> None:
  stored, config = flatten(base()), base()
  del stored['ppo.gamma']  # as if the run were older than the field
  assert differences(stored, config) == []
  config.ppo.gamma = 0.5
  assert differences(stored, config) == ['ppo.gamma: stored 1.0, now 0.5']


def test_every_argument_is_a_field() -> None:
  for field, _ in config_lib.ARGUMENTS.values():
    assert field in flatten(base())


@pytest.mark.parametrize(
    'steps, epochs, rows, want',
    [
        (13, 1.0, 1000, 13),
        (0, 1.0, 1000, 15),  # 1000 / 64 = 15.6
        (0, 2.5, 1000, 39),  # 2500 / 64 = 39.06
        (0, 0.5, 100, 1),  # 50 rows fill no batch
    ],
)
def test_updates_of_a_stage(
    steps: int, epochs: float, rows: int, want: int
) -> None:
  stage = ml_collections.ConfigDict(
      {'steps': steps, 'epochs': epochs, 'batch_size': 64}
  )
  assert num_steps(stage, rows) == want


def test_lengths_are_those_of_the_task_unless_given() -> None:
  config = base()
  for task, want in config_lib.TASK_LENGTHS.items():
    config.data.task = task
    assert lengths(config) == want
  config.data.max_prompt_len = 17
  assert lengths(config) == (17, want[1])
  config.data.max_response_len = 19
  assert lengths(config) == (17, 19)
