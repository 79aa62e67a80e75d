"""Finds the cheapest set-up of a recipe that fits a machine.

Formulas order what may be tried; the compiler decides. A stage that does not
fit gets smaller passes, then the next layout is tried.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import time
from typing import Any

from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import validation
from ma_rlhf_jax.parallel.mesh import mesh_shape
from ma_rlhf_jax.planning import estimate, plans, roofline
from ma_rlhf_jax.planning.compiling import Compiled
from ma_rlhf_jax.planning.planner import PASSES, Planner, problems

# What may change without changing what is learned, then what rounds more; of
# options that the config does not have nothing is tried. () = all choices that
# validation knows.
LAYOUTS: dict[str, tuple[Any, ...]] = {
    'mesh.tensor': (1, 2, 4, 8),
    'model.remat': (),
    'model.frozen_memory': (),
    'model.offload': (),
}
ROUNDS: dict[str, tuple[Any, ...]] = {
    'model.moment_dtype': (),
}
# Field that decides on the passes of a program.
_KNOBS = {
    'sft': 'sft.micro_batch_size',
    'reward_model': 'reward_model.micro_batch_size',
    'ppo': 'ppo.micro_batch_size',
}
# Layouts that are compiled, best first by the formulas.
_TRIES = {'tpu': 2, 'gpu': 1}


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A config and the seconds that the formulas give it."""

  seconds: float
  config: ConfigDict


def _with(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
  made = config_lib.restore(config_lib.flatten(config))
  made.update_from_flattened_dict(values)
  return made


def _choices(flat: dict[str, Any], space: dict[str, Any]) -> list[list[tuple]]:
  """(field, value) pairs of every field that the config has."""
  options = []
  for field, values in space.items():
    if field in flat:
      known = (False, True) if isinstance(flat[field], bool) else ()
      values = values or validation.CHOICES.get(field, known)
      options.append([(field, v) for v in dict.fromkeys([flat[field], *values])])
  return options


def layouts(
    config: ConfigDict, planner: Planner, space: dict[str, Any]
) -> Iterator[ConfigDict]:
  """Configs that differ in layout; all are valid with small passes."""
  flat = config_lib.flatten(config)
  for values in itertools.product(*_choices(flat, space)):
    made = dict(values)
    if 'mesh.tensor' in made and planner.topology.num_devices > 1:
      # All others share weights and rows.
      made |= {'mesh.data': 1, 'mesh.fsdp': -1}
    made = _with(config, made)
    try:
      shape = mesh_shape(made.mesh, planner.topology.num_devices)
    except ValueError:
      continue
    if not problems(with_rows(made, shape[0] * shape[1], 1), planner.topology):
      yield made


def knob(program: str) -> str:
  """The field that decides on a program's passes."""
  if estimate.is_decode(program):
    return 'rollout.batch_size'
  return _KNOBS[program.partition('/')[0]]


def _whole(config: ConfigDict, field: str) -> int:
  """Rows that the passes of a field split."""
  rows = config.ppo.batch_size * config.ppo.samples_per_prompt
  if field == 'rollout.batch_size':
    return rows
  if field == 'ppo.micro_batch_size':
    return rows // config.ppo.minibatches
  return config[field.partition('.')[0]].batch_size


def with_rows(config: ConfigDict, devices: int, rows: int) -> ConfigDict:
  """`config` with passes of so many rows a device, where there are as many."""
  values = {}
  for field in (*_KNOBS.values(), 'rollout.batch_size'):
    size = min(_whole(config, field), devices * rows)
    values[field] = size
  return _with(config, values)


def smaller(config: ConfigDict, field: str, devices: int) -> ConfigDict | None:
  """`config` with half as many rows a pass; None where that cannot be."""
  block, name = field.split('.')
  size = (config[block][name] or _whole(config, field)) // 2
  if size < devices or size % devices or _whole(config, field) % size:
    return None
  return _with(config, {field: size})


class Search:
  """A search on one machine.

  Attributes:
    calibration: what was measured over what the formula said, by program:
      (temporaries, wire).
  """

  def __init__(
      self, planner: Planner, config: ConfigDict, say: Callable[[str], None]
  ):
    """Surveys `config`, or what comes closest to it and can run.

    Raises:
      ValueError: if nothing can run on that many devices.
    """
    self._planner, self._say = planner, say
    self._config = _valid(config, planner)
    stages = planner.survey(self._config)['stages']
    self._resident = {
        name: sum(stage['resident'].values()) for name, stage in stages.items()
    }
    self._steps = {p: s['steps'] for s in stages.values() for p in s['programs']}
    self.calibration: dict[str, tuple[float, float]] = {}

  @property
  def _devices(self) -> int:
    return self._planner.topology.num_devices

  def _rows_over(self, config: ConfigDict) -> int:
    data, fsdp, _ = mesh_shape(config.mesh, self._devices)
    return data * fsdp

  def learn(self, plan: plans.Plan) -> None:
    """Later guesses go by what this plan has measured."""
    for p in (p for stage in plan.stages for p in stage.programs):
      c, guess = p.compiled, estimate.load(p.name, plan.config, self._devices)
      temp = c.memory.temp if c.memory else c.required - c.resident_args
      wire = c.wire / max(guess.wire, 1) if c.memory else 1.0
      self.calibration[p.name] = temp / max(guess.temp, 1), wire

  def _need(self, config: ConfigDict, program: str) -> float:
    """Bytes of a device that a program may need."""
    temp = estimate.load(program, config, self._devices).temp
    ratio, _ = self.calibration.get(program, (1.0, 1.0))
    resident = self._resident[program.partition('/')[0]]
    return resident + temp * min(max(ratio, 1 / 3), 3)

  def _seconds(self, config: ConfigDict) -> float:
    total, topology = 0.0, self._planner.topology
    for program, steps in self._steps.items():
      load = estimate.load(program, config, self._devices)
      _, ratio = self.calibration.get(program, (1.0, 1.0))
      work = Compiled(
          None, 0, int(load.flops), 0, 0, load.hbm, load.wire * ratio
      )
      found = roofline.seconds(work, topology, self._planner.shares)
      total += steps * found.total
    return total

  def _shrunk(self, config: ConfigDict, program: str) -> ConfigDict | None:
    """`config` with passes in which the program may fit; None = no such."""
    devices = self._rows_over(config)
    while self._need(config, program) > plans.MARGIN * self._planner.hbm:
      less = smaller(config, knob(program), devices)
      if less is None:
        return None
      config = less
    return config

  def ranked(self, space: dict[str, Any]) -> list[Ranked]:
    """Layouts with the largest passes that may fit, best first.

    Those that fit by no formula come last, with the smallest passes.
    """
    found = []
    for layout in layouts(self._config, self._planner, space):
      config, hopeless = with_rows(layout, self._rows_over(layout), 2**20), 0
      for program in self._steps:
        less = self._shrunk(config, program)
        if less is None:
          hopeless = 1
          less = _with(config, {knob(program): self._rows_over(layout)})
        config = less
      found.append((hopeless, Ranked(self._seconds(config), config)))
    found.sort(key=lambda x: (x[0], x[1].seconds))
    return [ranked for _, ranked in found]

  def realise(self, config: ConfigDict) -> plans.Plan:
    """The plan of a layout with passes as large as fit.

    Where none fit, it is that of the smallest.
    """
    while True:
      plan = self._planner.plan(config, stop_at_misfit=True)
      self.learn(plan)
      misfits = plan.misfits()
      less = None
      if misfits:
        less = smaller(config, knob(misfits[0]), self._rows_over(config))
      if less is None:
        return plan
      config = self._shrunk(less, misfits[0]) or less
      self._say(f'{misfits[0]} does not fit; smaller passes are tried')

  def run(self, seconds: float) -> plans.Plan:
    """The cheapest plan that fits; the one that lacks least where none does.

    Args:
      seconds: after which no other layout is begun.
    """
    start, best, tried = time.monotonic(), None, set()
    for space in (LAYOUTS, LAYOUTS | ROUNDS):
      for _ in range(_TRIES[self._planner.topology.platform]):
        fresh = [r for r in self.ranked(space) if _name(r.config) not in tried]
        if not fresh or best and time.monotonic() - start > seconds:
          break
        tried.add(_name(fresh[0].config))
        plan = self.realise(fresh[0].config)
        best = min(filter(None, (best, plan)), key=_cost)
      if best is not None and best.fits:
        break
    return best


def _name(config: ConfigDict) -> str:
  """Equal for layouts that differ in their passes only."""
  flat = config_lib.flatten(config)
  return str({k: v for k, v in flat.items() if k not in PASSES})


def _cost(plan: plans.Plan) -> tuple[bool, float]:
  return not plan.fits, plan.seconds if plan.fits else plan.peak


def _valid(config: ConfigDict, planner: Planner) -> ConfigDict:
  """`config`, or the first layout of it that can run on the machine."""
  found = problems(config, planner.topology)
  if not found:
    return config
  for made in layouts(config, planner, LAYOUTS):
    data, fsdp, _ = mesh_shape(made.mesh, planner.topology.num_devices)
    return with_rows(made, data * fsdp, 1)
  raise ValueError(
      f'no layout of the recipe splits over {planner.topology.num_devices} '
      'devices:\n  ' + '\n  '.join(found)
  )
