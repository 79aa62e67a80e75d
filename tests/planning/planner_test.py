"""Plans of made-up compiles: each is made once, and added up."""

from collections.abc import Iterator

import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.planning import buffers, planner, roofline, topology
from ma_rlhf_jax.planning.compiling import Compiled
from tests import tiny

PROGRAMS = {
    'sft': ('sft/update',),
    'ppo': ('ppo/rollout', 'ppo/score', 'ppo/update_policy'),
}
GIB = 2**30


class Machine:
  """Stands for children; remembers what was compiled.

  Attributes:
    compiled: (program, config) in order.
    surveys: configs in order.
    temp: bytes of the temporaries of a program under a config.
    wire: bytes that it sends.
    hbm: bytes that it reads and writes.
  """

  def __init__(self):
    self.compiled: list[tuple[str, config_lib.ConfigDict]] = []
    self.surveys: list[config_lib.ConfigDict] = []
    self.temp = lambda program, config: GIB
    self.wire = lambda program, config: 10**9
    self.hbm = lambda program, config: 10**9

  def child(self, config, topology, program='', **kwargs):
    """What `compiling.Child` is called for."""
    child = _Child(self, config, program)
    if program:
      self.compiled.append((program, config))
    else:
      self.surveys.append(config)
    return child


class _Child:
  done = True

  def __init__(self, machine, config, program):
    self._machine, self._config, self.program = machine, config, program

  def close(self) -> None:
    pass

  def survey(self) -> dict:
    facts = {'flops': 10**15, 'resident_args': GIB, 'other_args': 0}
    return {
        'hbm': 16 * GIB,
        'stages': {
            stage: {
                'steps': 10,
                'resident': {'policy': 2 * GIB, 'critic': GIB},
                'programs': {name: dict(facts) for name in names},
            }
            for stage, names in PROGRAMS.items()
            if stage in self._config.stages
        },
    }

  def compiled(self) -> Compiled:
    temp = int(self._machine.temp(self.program, self._config))
    memory = buffers.Memory(GIB, temp, 0)
    wire = self._machine.wire(self.program, self._config)
    hbm = self._machine.hbm(self.program, self._config)
    return Compiled(
        memory, memory.need, 10**15, GIB, 0, hbm_bytes=hbm, wire=wire
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
  made = Machine()
  monkeypatch.setattr(planner, 'Child', made.child)
  yield made


def make(name: str = 'v5e:2x4', **kwargs: object) -> planner.Planner:
  """A planner of a machine of that name."""
  shares = roofline.Shares()
  return planner.Planner(topology.parse(name), shares=shares, **kwargs)


def config(**fields: object) -> config_lib.ConfigDict:
  """Of 7B, in two stages."""
  return tiny.config(
      **{
          'stages': ('sft', 'ppo'),
          'model__preset': 'gemma-7b',
          'model__dtype': 'bfloat16',
          'mesh__data': 1,
          'mesh__fsdp': -1,
          'ppo__batch_size': 256,
          'data__max_prompt_len': 512,
          'data__max_response_len': 512,
          'model__logprob_chunk': 4096,
          **fields,
      }
  )


def test_a_kernel_is_checked_for_the_machine_that_is_planned() -> None:
  made = config(model__attention='cudnn')
  assert planner.problems(made, topology.parse('gpu:h100:1')) == []
  (found,) = planner.problems(made, topology.parse('gpu:a100:1'))
  assert "model.attention='cudnn'" in found and '8.0' in found
  (found,) = planner.problems(made, topology.parse('v5e:1x1'))
  assert 'not on this tpu' in found


def test_a_plan_adds_up_what_was_compiled(machine: Machine) -> None:
  plan = make().plan(config())
  assert [s.name for s in plan.stages] == ['sft', 'ppo']
  assert [p.name for p in plan.stages[1].programs] == list(PROGRAMS['ppo'])
  assert plan.hbm == 16 * GIB
  # 3 GiB stay, and 1 GiB of temporaries.
  assert plan.peak == 4 * GIB
  each = 10**15 / (8 * 197e12 * 0.45)
  assert plan.seconds == pytest.approx(10 * 4 * each)
  # What needs most comes first.
  order = [name for name, _ in machine.compiled]
  assert order.index('ppo/update_policy') == 0


def test_nothing_is_compiled_twice(machine: Machine) -> None:
  plans_of = make()
  plans_of.plan(config())
  plans_of.plan(config(ppo__micro_batch_size=64))
  names = [name for name, _ in machine.compiled]
  # Neither SFT nor the rollout depend on the passes of PPO.
  assert names.count('sft/update') == names.count('ppo/rollout') == 1
  assert names.count('ppo/update_policy') == names.count('ppo/score') == 2
  assert len(machine.surveys) == 1


def test_whole_batches_have_one_name(machine: Machine) -> None:
  plans_of = make()
  plans_of.plan(config())
  plans_of.plan(config(ppo__micro_batch_size=256))
  assert [n for n, _ in machine.compiled].count('ppo/score') == 1
  # Scoring takes all 256 rows at once, an update those of a minibatch.
  plans_of.plan(config(ppo__minibatches=2))
  plans_of.plan(config(ppo__minibatches=2, ppo__micro_batch_size=128))
  assert [n for n, _ in machine.compiled].count('ppo/score') == 3


def test_a_misfit_may_end_it(machine: Machine) -> None:
  machine.temp = lambda program, config: 20 * GIB
  plan = make().plan(config(), stop_at_misfit=True)
  assert [p.name for s in plan.stages for p in s.programs] == [
      'ppo/update_policy'
  ]
  assert not plan.fits and plan.misfits() == ['ppo/update_policy']


def test_gpus_are_planned_without_compiling(machine: Machine) -> None:
  plan = make('gpu:h200:8').plan(config())
  assert machine.compiled == []
  assert plan.hbm == int(139.6 * GIB)
  assert plan.stages[1].programs[2].compiled.memory.temp > GIB


def test_progress_names_programs_and_time_left(machine: Machine) -> None:
  told: list[str] = []
  make(say=told.append).plan(config())
  assert told[0] == 'v5e:2x4: what there is to plan'
  assert told[1].startswith('ppo/update_policy compiled, 1 of 4, about ')
  assert told[-1] == 'ppo/score compiled, 4 of 4'


@pytest.mark.parametrize(
    ('fields', 'word'),
    [
        ({'mesh__fsdp': 3}, 'does not cover'),
        ({'ppo__batch_size': 6}, 'multiple'),
    ],
)
def test_what_cannot_run_there_is_told(fields: dict, word: str) -> None:
  found = planner.problems(config(**fields), topology.parse('v5e:2x4'))
  assert any(word in line for line in found)
