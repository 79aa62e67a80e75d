"""The fields of a run: their defaults, their checks and their words."""

import json
import pathlib

import pytest

from ma_rlhf_jax.config import base, flatten
from ma_rlhf_jax.config_fields import BLOCKS, FIELDS
from ma_rlhf_jax.training import symptoms

# `flatten(base())` of de50c7e, the commit before there were records. Runs that
# were started then resume with these values.
_STORED = pathlib.Path(__file__).parent / 'reference' / 'config_defaults.json'


def test_defaults_and_types_are_those_that_runs_have_stored() -> None:
  stored = json.loads(_STORED.read_text())
  now = {name: value for name, value in flatten(base()).items()}
  assert len(stored) == 188
  # As text, so that 1 and 1.0 differ.
  assert {n: repr(now.get(n)) for n in stored} == {
      n: repr(value) for n, value in stored.items()
  }


def test_base_has_every_field_once() -> None:
  assert flatten(base()).keys() == FIELDS.keys()
  assert sum(len(block.fields) for block in BLOCKS.values()) == len(FIELDS)


@pytest.mark.parametrize('name', FIELDS)
def test_a_field_says_what_it_is_and_its_default_is_allowed(name: str) -> None:
  field = FIELDS[name]
  assert field.problem(name, field.default) == ''
  assert field.meaning.endswith('.') and field.meaning[0].isupper()
  assert '|' not in field.meaning + field.check.need  # a cell of a table
  assert field.source in ('', 'paper', 'authors', 'SPO')
  # A number has a bound at least on one side.
  if type(field.default) in (int, float):
    assert field.check.words


def test_what_may_change_on_resume() -> None:
  whole = {
      name
      for name, block in BLOCKS.items()
      if all(field.resumable for field in block.fields.values())
  }
  assert whole == set(
      'log profile checkpoint export evaluate stop mesh'.split()
  )
  single = {n for n, f in FIELDS.items() if f.resumable}
  single = {n for n in single if n.split('.')[0] not in whole}
  assert single == set(
      'stages model.remat model.unroll model.attention model.frozen_memory'
      ' model.logprob_chunk data.cache_dir macro.parse_workers rollout.tensor'
      ' ppo.length_buckets ppo.one_pass'.split()
  )


def test_every_symptom_can_stop_a_run() -> None:
  assert tuple(BLOCKS['stop'].fields) == symptoms.CODES
