"""What people and programs read."""

import dataclasses
import json

from ma_rlhf_jax.planning import loops, report, roofline, traffic
from ma_rlhf_jax.planning.topology import GIB
from tests import tiny
from tests.planning.plans_test import made_plan

_NEEDS = {'ppo/score': 5 * GIB, 'ppo/update_policy': 10 * GIB}


def _text(hbm: float, price: float | None = None) -> str:
  plan = made_plan(int(hbm * GIB), _NEEDS)
  return report.text(plan, roofline.Shares(), price)


def test_a_plan_that_fits_says_with_what() -> None:
  last = _text(15.75).splitlines()[-1]
  assert last.startswith('fits: 10.00 of 15.75 GiB a device, with mesh.data=8 ')
  for word in (
      'ppo.micro_batch_size=0',
      'rollout.batch_size=0',
      'model.remat=',
  ):
    assert word in last


def test_a_plan_that_does_not_fit_says_what_is_missing() -> None:
  last = _text(8).splitlines()[-1]
  # 10 - 0.92 * 8
  assert last.startswith('does not fit: 10.00 of 8.00 GiB a device')
  assert 'short of 92% of it by 2.64 GiB' in last
  assert _text(10.5).splitlines()[-1].startswith('tight: ')


def test_the_report_names_every_program_and_warning() -> None:
  text = _text(15.75)
  for word in (*_NEEDS, 'warning: ppo/score: beware', 'policy', 'compute'):
    assert word in text
  assert 'ppo: 4 s a step; 3 steps 12 s' in text
  assert '8 chip(s)' in text


def test_cost_is_chip_hours_times_the_price() -> None:
  # 12 s on 8 chips = 96 / 3600 hours, at 300 an hour
  assert 'chip hours, 8.00 at 300 an hour' in _text(15.75, price=300)
  assert '(--price)' in _text(15.75)


def test_without_rows_nothing_is_said_of_the_whole() -> None:
  plan = dataclasses.replace(made_plan(16 * GIB, _NEEDS), rows=None)
  text = report.text(plan, roofline.Shares(), 2.0)
  assert 'give --rows' in text and 'chip hours' not in text
  assert report.as_json(plan, plan.config, 2.0)['cost'] is None


def test_json_holds_bytes_and_seconds() -> None:
  plan = made_plan(16 * GIB, _NEEDS)
  given = tiny.config(ppo__micro_batch_size=99)
  made = json.loads(json.dumps(report.as_json(plan, given, 300)))
  micro = plan.config.ppo.micro_batch_size
  assert f'--config.ppo.micro_batch_size={micro}' in made['flags']
  assert (made['fits'], made['peak_bytes']) == (True, 10 * GIB)
  assert made['cost'] == 8.0
  program = made['stages']['ppo']['programs']['ppo/score']
  assert program['need_bytes'] == 5 * GIB
  assert program['seconds']['total'] == 2.0


def test_flags_make_one_config_of_another() -> None:
  flags = report.changed(tiny.config(ppo__micro_batch_size=2), tiny.config())
  assert flags == '--config.ppo.micro_batch_size=2'


def test_what_is_sent_while_tokens_are_drawn_is_told_apart() -> None:
  def sent(trips: int, early: bool) -> traffic.Collective:
    around = (loops.Loop('loop', trips, early),)
    return traffic.Collective('all-reduce', (), 8, GIB / 4, around, '')

  plan = made_plan(16 * GIB, {'ppo/rollout': 5 * GIB})
  (stage,) = plan.stages
  (program,) = stage.programs
  compiled = dataclasses.replace(
      program.compiled,
      wire=4.0 * GIB,
      collectives=(sent(6, True), sent(10, False)),
  )
  program = dataclasses.replace(program, compiled=compiled)
  stage = dataclasses.replace(stage, programs=(program,))
  plan = dataclasses.replace(plan, stages=(stage,))
  words = 'ppo/rollout: 1.50 of 4.00 GiB are sent while tokens are drawn'
  assert words in report.text(plan, roofline.Shares(), None)
  made = report.as_json(plan, plan.config, None)
  made = made['stages']['ppo']['programs']['ppo/rollout']
  assert made['decode_loop_wire_bytes'] == 1.5 * GIB


def test_what_cannot_be_counted_is_said_and_has_no_seconds() -> None:
  plan = made_plan(16 * GIB, _NEEDS)
  (stage,) = plan.stages
  first, *others = stage.programs
  why = 'the text tells no number of trips for while.5'
  compiled = dataclasses.replace(first.compiled, doubts=(why,))
  programs = (dataclasses.replace(first, compiled=compiled), *others)
  stage = dataclasses.replace(stage, programs=programs)
  plan = dataclasses.replace(plan, stages=(stage,))
  text = report.text(plan, roofline.Shares(), 300)
  (line,) = (x for x in text.splitlines() if x.startswith('NOT COUNTED'))
  assert first.name in line and 'while.5' in line
  assert 'a step' not in text and 'chip hours' not in text
  assert text.splitlines()[-1].startswith('fits: ')  # memory is not in doubt
  made = json.loads(json.dumps(report.as_json(plan, plan.config, 300)))
  assert made['counted'] is False
  assert made['seconds'] is None and made['cost'] in (None, False)
  assert made['stages']['ppo']['seconds'] is None
  programs = made['stages']['ppo']['programs']
  assert programs[first.name]['seconds'] is None
  assert programs[first.name]['doubts'] == [why]
  assert programs[others[0].name]['seconds']['total'] > 0
