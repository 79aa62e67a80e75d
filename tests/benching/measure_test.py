"""A report of all phases, as a table and beside another."""

import copy

import jax
import pytest

from ma_rlhf_jax.benching import ceilings, measure
from ma_rlhf_jax.parallel.mesh import make_mesh
from tests import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def report() -> dict:
  """Of the tiny shape."""
  config = tiny.config(
      data__max_prompt_len=8, data__max_response_len=8, ppo__batch_size=8
  )
  config.model.vocab_size = 50
  with pytest.MonkeyPatch.context() as patch, jax.set_mesh(
      make_mesh(config.mesh)
  ):
    patch.setattr(ceilings, 'measure', lambda _: ceilings.Ceilings(1e12, 1e11))
    return measure.measure(config, spread='full', runs=2, say=lambda _: None)


def test_every_phase_is_measured(report: dict) -> None:
  assert set(report['phases']) == {
      'prefill', 'decode', 'score', 'learn', 'iteration',
  }  # fmt: skip
  assert all(len(x) == 2 for x in report['seconds'].values())
  assert report['tokens'] == {
      'useful': 128, 'computed': 128, 'useful_share': 1.0,
  }  # fmt: skip
  assert report['one_pass'] == ['policy', 'critic']
  assert report['peak_gib'] > 0


def test_the_table_names_shape_device_and_phases(report: dict) -> None:
  table = measure.table(report)
  for word in ('8 x (8 + 8)', 'cpu', 'prefill', 'iteration', '100 %'):
    assert word in table
  assert all(len(line) < 120 for line in table.splitlines())


def test_two_reports_stand_side_by_side(report: dict) -> None:
  other = copy.deepcopy(report)
  other['phases']['learn']['seconds'] = 3 * report['phases']['learn']['seconds']
  other['device'] = '8 x tpu'
  text = measure.comparison(report, other)
  (line,) = [x for x in text.splitlines() if x.startswith('learn')]
  assert line.endswith('3.00')
  assert 'device: ' in text and 'shape: ' not in text
