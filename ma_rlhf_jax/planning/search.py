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
from ma_rlhf_jax.planning import estimate, plans
from ma_rlhf_jax.planning.planner import Planner, problems

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
_TRIES = 3


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
    calibration: what was measured over what the formula said, by program.
  """

  def __init__(
      self, planner: Planner, base: plans.Plan, say: Callable[[str], None]
  ):
    self._planner, self._base, self._say = planner, base, say
    self._resident = {s.name: sum(s.resident.values()) for s in base.stages}
    self._flops = {
        p.name: p.compiled.flops for s in base.stages for p in s.programs
    }
    self.calibration: dict[str, float] = {}
    self._learn(base)

  def _learn(self, plan: plans.Plan) -> None:
    for stage in plan.stages:
      for p in stage.programs:
        if p.compiled.memory is not None:
          guess = estimate.load(p.name, plan.config, self._devices).temp
          self.calibration[p.name] = p.compiled.memory.temp / max(guess, 1)

  @property
  def _devices(self) -> int:
    return self._planner.topology.num_devices

  def _rows_over(self, config: ConfigDict) -> int:
    data, fsdp, _ = mesh_shape(config.mesh, self._devices)
    return data * fsdp

  def _guess(self, config: ConfigDict, program: str) -> float:
    """Bytes of a device that a program may need."""
    temp = estimate.load(program, config, self._devices).temp
    temp *= min(max(self.calibration.get(program, 1.0), 0.5), 2.0)
    return self._resident[program.partition('/')[0]] + temp

  def _seconds(self, config: ConfigDict) -> float:
    total, chip = 0.0, self._planner.topology.chip
    for stage in self._base.stages:
      for p in stage.programs:
        load = estimate.load(p.name, config, self._devices)
        share = self._flops[p.name] / self._devices / chip.flops / 0.45
        wire = load.wire / self._planner.topology.wire / 0.7
        total += stage.steps * max(share, load.hbm / chip.hbm / 0.6, wire)
    return total

  def ranked(self, space: dict[str, Any]) -> list[Ranked]:
    """Layouts with the largest passes that may fit, best first."""
    found = []
    for layout in layouts(self._base.config, self._planner, space):
      devices = self._rows_over(layout)
      config, hopeless = with_rows(layout, devices, 2**20), False
      for program in self._flops:
        while self._guess(config, program) > plans.MARGIN * self._base.hbm:
          less = smaller(config, knob(program), devices)
          if less is None:
            hopeless = True
            break
          config = less
      seconds = self._seconds(config)
      found.append(Ranked(seconds * (1e6 if hopeless else 1), config))
    return sorted(found, key=lambda r: r.seconds)

  def realise(self, config: ConfigDict) -> plans.Plan | None:
    """The plan of a layout with passes as large as fit; None if none does."""
    devices = self._rows_over(config)
    while True:
      plan = self._planner.plan(config, stop_at_misfit=True)
      self._learn(plan)
      misfits = plan.misfits()
      if not misfits:
        return plan
      less = smaller(config, knob(misfits[0]), devices)
      if less is None:
        return None
      self._say(f'{misfits[0]} does not fit; {knob(misfits[0])} is halved')
      config = less

  def run(self, seconds: float) -> plans.Plan | None:
    """The cheapest plan that fits, or None.

    Args:
      seconds: after which no other layout is begun.
    """
    start, best = time.monotonic(), None
    if self._base.fits:
      best = self._base
    for space in (LAYOUTS, LAYOUTS | ROUNDS):
      for ranked in self.ranked(space)[:_TRIES]:
        if time.monotonic() - start > seconds:
          return best
        plan = self.realise(ranked.config)
        if plan and (best is None or plan.seconds < best.seconds):
          best = plan
      if best is not None or not any(
          field in config_lib.flatten(self._base.config) for field in ROUNDS
      ):
        break
    return best


def begin(planner: Planner, config: ConfigDict) -> plans.Plan:
  """The plan of a config as it is; with one row a device where it cannot run.

  A batch that does not split over the devices as the config has it may do so
  with other passes or another mesh.
  """
  if not problems(config, planner.topology):
    return planner.plan(config)
  for made in layouts(config, planner, LAYOUTS):
    data, fsdp, _ = mesh_shape(made.mesh, planner.topology.num_devices)
    return planner.plan(with_rows(made, data * fsdp, 1))
  raise ValueError(
      f'no layout of the recipe splits over {planner.topology.num_devices} '
      'devices:\n  ' + '\n  '.join(problems(config, planner.topology))
  )
