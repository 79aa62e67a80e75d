"""The search, on a machine that needs what the tests say."""

import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.planning import estimate, plans, search, setups
from tests.planning import planner_test
from tests.planning.planner_test import GIB, Machine, config, make

machine = planner_test.machine


def _search(
    made: config_lib.ConfigDict, name: str = 'v5e:2x4'
) -> search.Search:
  return search.Search(make(name), made, lambda text: None)


def _by_rows(program: str, made: config_lib.ConfigDict) -> float:
  """An eighth of a GiB for each row of a pass on a device."""
  _, rows = estimate.passes_of(program, made)
  tensor = made.mesh.tensor
  return rows / (8 / tensor) / 8 * GIB / tensor


def test_passes_shrink_until_they_fit(machine: Machine) -> None:
  machine.temp = lambda program, made: 3 * _by_rows(program, made)
  found = _search(config(mesh__tensor=1)).realise(config())
  assert found.fits
  # 11.7 GiB are free: 31 rows of 3/8 GiB a device, so 16 of 256 / 8 = 32.
  assert found.config.ppo.micro_batch_size == 128
  assert found.config.sft.micro_batch_size in (0, 64)


def test_the_smallest_passes_are_the_end(machine: Machine) -> None:
  machine.temp = lambda program, made: 100 * GIB
  found = _search(config()).run(60)
  assert not found.fits
  assert found.peak == 103 * GIB
  tensor = found.config.mesh.tensor
  assert found.config.ppo.micro_batch_size == 8 // tensor


def test_the_cheaper_of_the_layouts_that_fit_is_kept(machine: Machine) -> None:
  # What the formulas rank first fits with the smallest passes only, and sends
  # much.
  first = _search(config()).ranked(setups.LAYOUTS)[0].config.mesh.tensor
  is_first = lambda made: made.mesh.tensor == first
  machine.temp = lambda program, made: (
      _by_rows(program, made) * (20 if is_first(made) else 1)
  )
  machine.wire = lambda program, made: 10**13 if is_first(made) else 10**9
  found = _search(config()).run(60)
  assert found.fits and found.config.mesh.tensor != first
  assert any(is_first(made) for _, made in machine.compiled)


def test_what_was_measured_corrects_the_formulas(machine: Machine) -> None:
  seeking = _search(config())
  before = seeking.ranked(setups.LAYOUTS)[0].config.ppo.micro_batch_size
  machine.temp = lambda program, made: 10 * _by_rows(program, made)
  seeking.learn(make().plan(config()))
  ratio = seeking.calibration['ppo/update_policy', 'full', 1].temp
  chip = make().topology.chip
  guess = estimate.load('ppo/update_policy', config(), 8, chip).temp
  assert ratio == pytest.approx(40 * GIB / guess)
  after = seeking.ranked(setups.LAYOUTS)[0].config.ppo.micro_batch_size
  assert after <= before


def test_the_answer_is_no_dearer_than_what_is_known_to_fit(
    machine: Machine,
) -> None:
  planner, made = make(), config()
  # Another split of the matrices promises to send less, and sends more.
  machine.wire = lambda program, other: 10**12 if other == made else 10**14
  given = planner.plan(made)
  before = len(machine.compiled)
  seeking = search.Search(planner, made, lambda text: None)
  seeking.learn(given)
  found = seeking.run(60, start=given)
  assert given.fits and found.config == made
  assert len(machine.compiled) > before  # others were tried


def test_a_recipe_that_cannot_run_as_it_is_gets_a_layout(
    machine: Machine,
) -> None:
  # 24 rows do not split over 16 devices, but over 16 / 2.
  rows = {'ppo__batch_size': 24, 'sft__batch_size': 24}
  found = _search(config(reward_model__batch_size=24, **rows), 'v5e:4x4').run(
      60
  )
  assert found.fits and found.config.mesh.tensor in (2, 4, 8)
  with pytest.raises(ValueError, match='no layout of the recipe'):
    _search(config(ppo__batch_size=3), 'v5e:16x16')


def test_plans_that_fit_come_before_those_that_do_not(
    machine: Machine,
) -> None:
  fits = make().plan(config())
  machine.temp = lambda program, made: 50 * GIB
  lacks = make().plan(config())
  assert isinstance(fits, plans.Plan)
  assert search._cost(fits) < search._cost(lacks)


def test_smaller_passes_come_before_other_layouts(machine: Machine) -> None:
  by_rows = lambda program, made: (
      _by_rows(program, made) * 3 * (program != 'sft/update')
  )
  machine.temp = by_rows
  planner, made = make(), config()
  given = planner.plan(made)
  assert not given.fits
  before = [name for name, _ in machine.compiled]
  seeking = search.Search(planner, made, lambda text: None)
  seeking.learn(given)
  found = seeking.run(60, cheapest=False, start=given)
  assert found.fits
  assert found.config.mesh == made.mesh
  # What fits as it is was not compiled again, nor for another layout.
  after = [name for name, _ in machine.compiled[len(before) :]]
  assert 'sft/update' not in after and 'ppo/update_policy' in after
  assert len(machine.surveys) == 1


@pytest.mark.parametrize('seconds', [0, 60])
def test_a_layout_is_not_begun_when_time_is_short(
    machine: Machine, seconds: float
) -> None:
  machine.wire = lambda program, made: 10**13  # others promise less
  told: list[str] = []
  search.Search(make(), config(), told.append).run(seconds)
  tried = sum(line.startswith('tries ') for line in told)
  assert (tried == 1) == (seconds == 0)
  assert any('untried' in line for line in told) == (seconds == 0)


def _split(made: config_lib.ConfigDict) -> int:
  return made.rollout.tensor or 8  # what is fastest


def test_one_field_that_only_drawing_reads_is_found(machine: Machine) -> None:
  # Weights that each device reads for every token.
  machine.hbm = lambda program, made: (
      10**14 // _split(made) if program == 'ppo/rollout' else 10**9
  )
  planner, made = make(), config(rollout__tensor=2)
  given = planner.plan(made)
  seeking = search.Search(planner, made, lambda text: None)
  seeking.learn(given)
  before = len(machine.compiled)
  found = seeking.run(60, start=given)
  assert found.config.rollout.tensor >= 8
  assert found.seconds < 0.95 * given.seconds
  # No other program was compiled for it.
  tried = machine.compiled[before:]
  assert {name for name, c in tried if c.mesh == made.mesh} == {'ppo/rollout'}


def test_no_neighbour_of_the_answer_saves_a_twentieth(
    machine: Machine,
) -> None:
  # What a user could set by hand: other passes, splits and ways to remember.
  passes = lambda made: 256 / (made.ppo.micro_batch_size or 256)
  learns = lambda program: program != 'ppo/rollout'
  machine.wire = lambda program, made: int(
      10**12 * passes(made) if learns(program) else 10**9
  )
  machine.hbm = lambda program, made: (
      10**14 // _split(made) if program == 'ppo/rollout' else 10**9
  )
  keeps = {'full': 6, 'attention': 6, 'dots': 9, 'none': 99}
  machine.temp = lambda program, made: (
      keeps[made.model.remat] * GIB / passes(made)
  )
  planner, made = make(), config(rollout__tensor=2)
  given = planner.plan(made)
  seeking = search.Search(planner, made, lambda text: None)
  seeking.learn(given)
  found = seeking.run(600, start=given)
  assert found.fits and found.seconds < 0.8 * given.seconds
  for other in seeking.neighbours(found.config):
    plan = planner.plan(other)
    assert not plan.fits or plan.seconds > 0.95 * found.seconds


def test_programs_of_a_step_follow_one_pass(machine: Machine) -> None:
  seeking = _search(config(ppo__one_pass='policy'))
  seeking._steps = {'ppo/rollout': 3, 'ppo/one_pass': 3, 'ppo/update_critic': 3}
  names = lambda how: set(seeking.programs(config(ppo__one_pass=how)))
  assert names('joint') == {'ppo/rollout', 'ppo/one_pass'}
  assert names('policy') == set(seeking._steps)
  assert names('off') - names('joint') == {
      'ppo/score',
      'ppo/update_policy',
      'ppo/update_critic',
  }


def test_another_layout_is_tried_where_the_first_does_not_fit(
    machine: Machine,
) -> None:
  machine.temp = lambda program, made: (
      50 * GIB if made.mesh.tensor == 1 else GIB
  )
  planner, made = make(), config()
  given = planner.plan(made)
  seeking = search.Search(planner, made, lambda text: None)
  seeking.learn(given)
  found = seeking.run(0, cheapest=False, start=given, slowest=100)
  assert found.fits and found.config.mesh.tensor > 1


def test_a_program_that_cannot_shrink_does_not_keep_others_large(
    machine: Machine,
) -> None:
  planner, made = make(), config(rollout__batch_size=256)
  large = lambda program, made: 4 * _by_rows(program, made)
  machine.temp = lambda program, made: (
      100 * GIB if program == 'sft/update' else large(program, made)
  )
  seeking = search.Search(planner, made, lambda text: None)
  given = planner.plan(made)
  seeking.learn(given)
  found = seeking.realise(made)
  assert not found.fits
  assert found.config.rollout.batch_size < 256
  assert found.config.ppo.micro_batch_size not in (0, 256)


def test_decoding_is_split_as_mesh_and_heads_allow(machine: Machine) -> None:
  made = config(rollout__tensor=2)
  seeking = _search(made)
  seeking.learn(make().plan(made))
  found = seeking.neighbours(made)
  # 16 heads on eight devices.
  splits = {other.rollout.tensor for other in found} - {2}
  assert splits == {1, 4, 8}
