"""What a program needs while all that stays, stays."""

from ma_rlhf_jax.planning import buffers, plans, roofline, topology
from ma_rlhf_jax.planning.compiling import Compiled
from tests import tiny


def _compiled(**fields: object) -> Compiled:
  known = {'required': 0, 'flops': 0, 'resident_args': 70, 'other_args': 5}
  return Compiled(**{'memory': None, **known, **fields})


def test_what_stays_counts_once_and_padding_counts() -> None:
  memory = buffers.Memory(args=80, temp=30, out=2)
  # 100 stay; the compiler counts 80 for 70 + 5, so 5 are padding.
  assert plans.need(_compiled(memory=memory), 100) == 100 + 5 + 5 + 30 + 2


def test_what_the_compiler_refused_comes_on_top_of_the_others() -> None:
  assert plans.need(_compiled(required=250), 100) == 100 + 250 - 70


def made_plan(
    hbm: int, needs: dict[str, int], seconds: float = 2.0
) -> plans.Plan:
  """A plan whose programs need so many bytes and take so long each."""
  programs = tuple(
      plans.ProgramPlan(
          name,
          _compiled(memory=buffers.Memory(75, need - 100, 0), flops=10**15),
          need,
          roofline.Seconds(seconds, 1.0, 0.5),
          ('beware',),
      )
      for name, need in needs.items()
  )
  stage = plans.StagePlan('ppo', 3, {'policy': 60, 'critic': 40}, programs)
  slice_ = topology.parse('v5e:2x4')
  config = tiny.config(stages=('ppo',))
  return plans.Plan(config, slice_, hbm, (stage,), rows=1000)


def test_a_plan_fits_with_a_margin() -> None:
  needs = {'ppo/score': 500, 'ppo/update_policy': 930}
  plan = made_plan(1000, needs)
  assert plan.peak == 930
  assert plan.stages[0].peak.name == 'ppo/update_policy'
  assert not plan.fits  # 920 would
  assert plan.misfits() == ['ppo/update_policy']
  assert made_plan(1020, needs).fits


def test_seconds_are_those_of_the_slowest_terms() -> None:
  plan = made_plan(1000, {'ppo/score': 500, 'ppo/update_policy': 900})
  assert plan.stages[0].seconds == 4.0
  assert plan.seconds == 3 * 4.0
