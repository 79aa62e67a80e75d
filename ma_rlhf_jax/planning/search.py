"""Finds the cheapest set-up of a recipe that fits a machine.

Formulas order what may be tried; the compiler decides. A stage that does not
fit gets smaller passes, then the next layout is tried.
"""

from collections.abc import Callable, Iterable, Iterator
import copy
import dataclasses
import functools
import itertools
import operator
import time
from typing import Any

from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import validation
from ma_rlhf_jax.parallel.mesh import mesh_shape
from ma_rlhf_jax.planning import estimate, plans, roofline
from ma_rlhf_jax.planning.compiling import Compiled
from ma_rlhf_jax.planning.planner import PASSES, Planner, problems, whole

# What may change without changing what is learned; of options that the config
# does not have nothing is tried. () = all choices that validation knows.
LAYOUTS: dict[str, tuple[Any, ...]] = {
    'mesh.tensor': (1, 2, 4, 8),
    'model.remat': ('full', 'none'),
    'model.frozen_memory': (),
}
# Field that decides on the passes of a program.
_KNOBS = {
    'sft': 'sft.micro_batch_size',
    'reward_model': 'reward_model.micro_batch_size',
    'ppo': 'ppo.micro_batch_size',
}
# Layouts that are compiled, best first by the formulas.
_TRIES = {'tpu': 3, 'gpu': 2}


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A config and what the formulas say.

  Attributes:
    lacks: whether it needs more than there is.
    order: its seconds, or where it lacks memory the bytes that it needs.
    config: of the run.
  """

  lacks: bool
  order: float
  config: ConfigDict


def _with(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
  made = copy.deepcopy(config)
  _set(made, values)
  return made


def _set(config: ConfigDict, values: dict[str, Any]) -> None:
  for name, value in values.items():
    *blocks, field = name.split('.')
    functools.reduce(operator.getitem, blocks, config)[field] = value


def _choices(flat: dict[str, Any], space: dict[str, Any]) -> list[list[tuple]]:
  """(field, value) pairs of every field that the config has."""
  options = []
  for field, values in space.items():
    if field in flat:
      known = (False, True) if isinstance(flat[field], bool) else ()
      values = values or validation.CHOICES.get(field, known)
      options.append(
          [(field, v) for v in dict.fromkeys([flat[field], *values])]
      )
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
  """The field that decides on a program's passes; '' = it has none."""
  if program == 'ppo/reshard':
    return ''
  if estimate.is_decode(program):
    return 'rollout.batch_size'
  return _KNOBS[program.partition('/')[0]]


def with_rows(config: ConfigDict, devices: int, rows: int) -> ConfigDict:
  """`config` with passes of so many rows a device, where there are as many."""
  values = {}
  for field in (*_KNOBS.values(), 'rollout.batch_size'):
    size = min(whole(config, field), devices * rows)
    values[field] = size
  return _with(config, values)


def halve(config: ConfigDict, field: str, devices: int) -> bool:
  """Halves the rows of a pass in place, if that can be; whether it could."""
  if not field:
    return False
  block, name = field.split('.')
  size = (config[block][name] or whole(config, field)) // 2
  if size < devices or size % devices or whole(config, field) % size:
    return False
  config[block][name] = size
  return True


class Search:
  """A search on one machine.

  Attributes:
    calibration: what was measured over what the formula said, (temporaries,
      wire), by program and `model.remat`.
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
    self._share = estimate.Sizes.of(self._config, self._devices).resident
    self._steps = {
        p: s['steps'] for s in stages.values() for p in s['programs']
    }
    self.calibration: dict[tuple[str, Any], tuple[float, float]] = {}

  @property
  def _devices(self) -> int:
    return self._planner.topology.num_devices

  def _rows_over(self, config: ConfigDict) -> int:
    data, fsdp, _ = mesh_shape(config.mesh, self._devices)
    return data * fsdp

  def learn(self, plan: plans.Plan) -> None:
    """Later guesses go by what this plan has measured."""
    remat = plan.config.model.remat
    for p in (p for stage in plan.stages for p in stage.programs):
      c, guess = p.compiled, self._planner.load(p.name, plan.config)
      temp = c.memory.temp if c.memory else c.required - c.resident_args
      wire = c.wire / max(guess.wire, 1) if c.memory else 1.0
      self.calibration[p.name, remat] = temp / max(guess.temp, 1), wire

  def _ratios(self, config: ConfigDict, program: str) -> tuple[float, float]:
    return self.calibration.get((program, config.model.remat), (1.0, 1.0))

  def _need(self, config: ConfigDict, program: str) -> float:
    """Bytes of a device that a program may need."""
    temp = self._planner.load(program, config).temp
    ratio, _ = self._ratios(config, program)
    resident = self._resident[program.partition('/')[0]]
    resident *= estimate.Sizes.of(config, self._devices).resident / self._share
    return resident + temp * min(max(ratio, 1 / 3), 3)

  def _seconds(self, config: ConfigDict) -> float:
    total, topology = 0.0, self._planner.topology
    for program, steps in self._steps.items():
      load = self._planner.load(program, config)
      _, ratio = self._ratios(config, program)
      work = Compiled(
          None, 0, int(load.flops), 0, 0, load.hbm, load.wire * ratio
      )
      found = roofline.seconds(work, topology, self._planner.shares)
      total += steps * found.total
    return total

  def _shrink(self, config: ConfigDict, program: str) -> bool:
    """Halves passes in place until the program may fit; whether it may."""
    devices = self._rows_over(config)
    while self._need(config, program) > plans.MARGIN * self._planner.hbm:
      if not halve(config, knob(program), devices):
        return False
    return True

  @functools.cache  # noqa: B019 - a search lives as long as its command
  def _layouts(self, space: tuple[tuple[str, Any], ...]) -> list[ConfigDict]:
    return list(layouts(self._config, self._planner, dict(space)))

  def ranked(self, space: dict[str, Any]) -> list[Ranked]:
    """Layouts with the largest passes that may fit, best first.

    Those that fit by no formula have the smallest passes and come last, the
    one that needs least before the others.
    """
    found = []
    for layout in self._layouts(tuple(space.items())):
      config, fits = with_rows(layout, self._rows_over(layout), 2**20), True
      for program in self._steps:
        fits &= self._shrink(config, program)
      need = max(self._need(config, program) for program in self._steps)
      order = self._seconds(config) if fits else need
      found.append(Ranked(not fits, order, config))
    return sorted(found, key=lambda r: (r.lacks, r.order))

  def realise(self, config: ConfigDict) -> plans.Plan:
    """The plan of a layout with passes as large as fit.

    Where none fit, it is that of the smallest.
    """
    while True:
      plan = self._planner.plan(config, stop_at_misfit=True)
      self.learn(plan)
      misfits, config = plan.misfits(), _with(config, {})
      fields = {knob(program) for program in misfits}
      devices = self._rows_over(config)
      if not any([halve(config, field, devices) for field in fields]):
        return plan
      for program in misfits:
        self._shrink(config, program)
      self._say(f'{", ".join(misfits)} too large; smaller passes are tried')

  def _untried(self, tried: set[str]) -> list[ConfigDict]:
    """Layouts that may be planned next, best first."""
    if len(tried) >= _TRIES[self._planner.topology.platform]:
      return []
    ranked = [r.config for r in self.ranked(LAYOUTS)]
    return [made for made in ranked if _name(made) not in tried]

  def run(
      self,
      seconds: float,
      *,
      cheapest: bool = True,
      start: plans.Plan | None = None,
      slowest: float = 0.0,
  ) -> plans.Plan:
    """The cheapest plan that fits; the one that lacks least where none does.

    Args:
      seconds: no layout is begun that is likely to take longer, but for the
        second one where the first does not fit.
      cheapest: look for a cheaper one when one fits.
      start: what was planned already, whole; the answer is no dearer.
      slowest: seconds that the plan of a layout may take.
    """
    begin = before = time.monotonic()
    best, tried = start, set()
    # What does not fit may do so with smaller passes.
    shrinks = start is not None and not start.fits
    fresh = [start.config] if shrinks else self._untried(tried)
    while fresh:
      tried.add(_name(fresh[0]))
      self._say(f'tries {_name(fresh[0], LAYOUTS)}')
      plan = self.realise(fresh[0])
      best = min(filter(None, (best, plan)), key=_cost)
      now = time.monotonic()
      slowest, before = max(slowest, now - before), now
      if best.fits and not cheapest:
        break
      fresh = self._untried(tried)
      is_late = now + slowest > begin + seconds
      if fresh and is_late and (best.fits or len(tried) > 1):
        self._say(
            f'the search ends with {len(fresh)} layouts untried; a larger '
            '--seconds may find one that is cheaper or fits'
        )
        break
    return best if best.fits else self._planner.plan(best.config)


def _name(config: ConfigDict, fields: Iterable[str] = ()) -> str:
  """Equal for layouts that differ in their passes only."""
  flat = config_lib.flatten(config)
  fields = fields or (name for name in flat if name not in PASSES)
  return ' '.join(f'{name}={flat[name]}' for name in fields if name in flat)


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
