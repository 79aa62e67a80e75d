"""Finds the cheapest set-up of a recipe that fits a machine.

Formulas, corrected by what was compiled so far, order what may be tried: all
layouts, and everything that differs from the best plan in one field. The
compiler decides. A stage that does not fit gets smaller passes.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import itertools
import time
from typing import Any

from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.parallel.mesh import mesh_shape
from ma_rlhf_jax.planning import estimate, plans, roofline
from ma_rlhf_jax.planning.compiling import Compiled
from ma_rlhf_jax.planning.planner import PASSES, Planner, problems, whole
from ma_rlhf_jax.planning.setups import (
    LAYOUTS,
    changed,
    choices,
    halve,
    knob,
    layouts,
    with_rows,
)

# What may change beside them, one by one from the best plan.
_BESIDE: dict[str, tuple[Any, ...]] = {
    'model.frozen_memory': (),
    'ppo.one_pass': (),
    'rollout.tensor': (),  # what the mesh and the heads allow
}
# Programs that score and learn in a step, by `ppo.one_pass`.
_LEARNED_BY = {
    'joint': ('ppo/one_pass',),
    'policy': ('ppo/one_pass', 'ppo/update_critic'),
    'off': ('ppo/score', 'ppo/update_policy', 'ppo/update_critic'),
}
_LEARNED = frozenset(itertools.chain(*_LEARNED_BY.values()))
# Set-ups that are planned at most; those of a GPU cost a survey each.
_TRIES = {'tpu': 24, 'gpu': 2}
# What needs no more than this times too much may fit: formulas are not exact.
_NEARLY = 4 / 3
# What a set-up must promise to save to be worth compiling.
_WORTH = 0.01


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


class Search:
  """A search on one machine.

  Attributes:
    calibration: what was measured over what the formula said, by program,
      `model.remat` and devices along `tensor`.
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
    self._share = self._sizes(self._config).resident
    self._steps = {
        p: s['steps'] for s in stages.values() for p in s['programs']
    }
    self._space = {'model.remat': LAYOUTS['model.remat']} | _BESIDE
    if 'ppo/one_pass' not in self._steps:  # the run cannot have it
      del self._space['ppo.one_pass']
    self.calibration: dict[tuple[str, str, int], estimate.Load] = {}

  @property
  def _devices(self) -> int:
    return self._planner.topology.num_devices

  def _rows_over(self, config: ConfigDict) -> int:
    data, fsdp, _ = mesh_shape(config.mesh, self._devices)
    return data * fsdp

  def _sizes(self, config: ConfigDict) -> estimate.Sizes:
    return estimate.Sizes.of(config, self._devices, self._planner.topology.chip)

  def _key(self, config: ConfigDict, program: str) -> tuple[str, str, int]:
    _, _, tensor = mesh_shape(config.mesh, self._devices)
    return program, config.model.remat, tensor

  def learn(self, plan: plans.Plan) -> None:
    """Later guesses go by what this plan has measured."""
    topology = self._planner.topology
    for p in (p for stage in plan.stages for p in stage.programs):
      c, guess = p.compiled, self._planner.load(p.name, plan.config)
      temp = c.memory.temp if c.memory else c.required - c.resident_args
      counted = c.memory is not None and not c.doubts
      found = estimate.Load(
          temp,
          c.hbm_bytes if counted else guess.hbm,
          c.wire if counted else guess.wire,
          c.flops or guess.flops,
          roofline.latency(c, topology) if counted else guess.waits,
      )
      ratios = (_ratio(*pair) for pair in zip(found, guess, strict=True))
      self.calibration[self._key(plan.config, p.name)] = estimate.Load(*ratios)

  def _ratios(self, config: ConfigDict, program: str) -> estimate.Load:
    """Those of this program as it was compiled most alike."""
    key = self._key(config, program)
    if key in self.calibration:
      return self.calibration[key]
    same = lambda made: sum(a == b for a, b in zip(made, key, strict=True))
    alike = [made for made in self.calibration if made[0] == program]
    if not alike:
      return estimate.Load(1.0, 1.0, 1.0, 1.0, 1.0)
    found = self.calibration[max(alike, key=same)]
    # What is kept says nothing of another `model.remat`, the others a little.
    return estimate.Load(
        1.0, *(min(max(ratio, 1 / 3), 3.0) for ratio in found[1:])
    )

  def programs(self, config: ConfigDict) -> dict[str, int]:
    """Steps of each program that a config runs; see `ppo.one_pass`."""
    kept = {p: n for p, n in self._steps.items() if p not in _LEARNED}
    base = {p: n for p, n in self._steps.items() if p in _LEARNED}
    if 'ppo/one_pass' not in base:
      return self._steps
    steps, how = base['ppo/one_pass'], config.ppo.one_pass
    return kept | dict.fromkeys(_LEARNED_BY[how], steps)

  def _need(self, config: ConfigDict, program: str) -> float:
    """Bytes of a device that a program may need."""
    temp = self._planner.load(program, config).temp
    ratio = self._ratios(config, program).temp
    resident = self._resident[program.partition('/')[0]]
    resident *= self._sizes(config).resident / self._share
    return resident + temp * min(max(ratio, 1 / 3), 3)

  def seconds(self, config: ConfigDict) -> float:
    """Of all steps, by the formulas as far as they are corrected."""
    total, topology = 0.0, self._planner.topology
    for program, steps in self.programs(config).items():
      load = self._planner.load(program, config)
      made = [
          a * b
          for a, b in zip(load, self._ratios(config, program), strict=True)
      ]
      _, hbm, wire, flops, waits = made
      work = Compiled(None, 0, int(flops), 0, 0, hbm, wire, waits=waits)
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
      programs = self.programs(config)
      for program in programs:
        fits &= self._shrink(config, program)
      need = max(self._need(config, program) for program in programs)
      order = self.seconds(config) if fits else need
      found.append(Ranked(not fits, order, config))
    return sorted(found, key=lambda r: (r.lacks, r.order))

  def realise(self, config: ConfigDict) -> plans.Plan:
    """The plan of a layout with passes as large as fit.

    Where none fit, it is that of the smallest.
    """
    while True:
      plan = self._planner.plan(config, stop_at_misfit=True)
      self.learn(plan)
      misfits, config = plan.misfits(), changed(config, {})
      fields = {knob(program) for program in misfits}
      devices = self._rows_over(config)
      if not any([halve(config, field, devices) for field in fields]):
        return plan
      for program in misfits:
        self._shrink(config, program)
      self._say(f'{", ".join(misfits)} too large; smaller passes are tried')

  def neighbours(self, config: ConfigDict) -> list[ConfigDict]:
    """Valid configs that differ in one field and may fit.

    Of another way to remember or to learn, with passes as large as may fit.
    """
    flat, devices = config_lib.flatten(config), self._rows_over(config)
    splits = tuple(self._sizes(config).decoding.choices)
    changes = [
        pair
        for options in choices(flat, self._space | {'rollout.tensor': splits})
        for pair in options
        if pair[1] != flat[pair[0]]
    ]
    for field in sorted({knob(program) for program in self._steps} - {''}):
      size = flat[field] or whole(config, field)
      changes += [
          (field, other)
          for other in (size // 2, size * 2)
          if other >= devices and whole(config, field) % other == 0
      ]
    found = []
    for change in changes:
      made = changed(config, dict([change]))
      if not problems(made, self._planner.topology) and all(
          self._shrink(made, program) for program in self.programs(made)
      ):
        found.append(made)
    return found

  def _fresh(
      self, tried: list[ConfigDict], best: plans.Plan | None
  ) -> list[ConfigDict]:
    """What may be planned next, best first.

    Where nothing fits yet, every layout that was not tried; else what promises
    to be cheaper: such a layout, or a neighbour of the best plan.
    """
    if len(tried) >= 2 * _TRIES[self._planner.topology.platform]:
      return []
    known = {_name(config) for config in tried}
    found = [r for r in self.ranked(LAYOUTS) if _name(r.config) not in known]
    if best is None or not best.fits:
      return [r.config for r in found]
    most = _NEARLY * plans.MARGIN * self._planner.hbm
    found = [
        Ranked(False, self.seconds(r.config), r.config) if r.lacks else r
        for r in found
        if not r.lacks or r.order <= most
    ]
    known = {_name(config, passes=True) for config in tried}
    for made in self.neighbours(best.config):
      if _name(made, passes=True) not in known:
        found.append(Ranked(False, self.seconds(made), made))
    bound = (1 - _WORTH) * best.seconds
    worth = [r for r in found if r.order < bound]
    return [r.config for r in sorted(worth, key=lambda r: r.order)]

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
      seconds: nothing is begun that is likely to end later, but for the second
        layout where the first does not fit.
      cheapest: look for a cheaper one when one fits.
      start: what was planned already, whole; the answer is no dearer.
      slowest: seconds that the plan of a layout may take.
    """
    begin = time.monotonic()
    best, tried = start, []
    each = slowest / len(self._steps)
    # What does not fit may do so with smaller passes.
    shrinks = start is not None and not start.fits
    fresh = [start.config] if shrinks else self._fresh(tried, best)
    while fresh:
      before, count = time.monotonic(), self._missing(fresh[0])
      shown = dict.fromkeys((*LAYOUTS, *self._space, *PASSES))
      self._say(f'tries {_name(fresh[0], shown)}')
      plan = self.realise(fresh[0])
      tried += [fresh[0], plan.config]
      best = min(filter(None, (best, plan)), key=_cost)
      now = time.monotonic()
      each = max(each, (now - before) / max(count, 1))
      if best.fits and not cheapest:
        break
      fresh = self._fresh(tried, best)
      left = begin + seconds - now
      in_time = [c for c in fresh if each * self._missing(c) <= left]
      if fresh and not in_time and (best.fits or len(tried) > 2):
        self._say(
            f'the search ends with {len(fresh)} set-ups untried; a larger '
            '--seconds may find one that is cheaper or fits'
        )
        break
      fresh = in_time or fresh
    return best if best.fits else self._planner.plan(best.config)

  def _missing(self, config: ConfigDict) -> int:
    return self._planner.missing(config, self.programs(config))


def _ratio(measured: float, guess: float) -> float:
  return measured / guess if guess and measured else 1.0


def _name(
    config: ConfigDict, fields: Iterable[str] = (), *, passes: bool = False
) -> str:
  """Equal for equal set-ups; of those that differ in passes only, by choice."""
  flat = config_lib.flatten(config)
  fields = fields or (name for name in flat if passes or name not in PASSES)
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
