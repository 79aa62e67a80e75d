"""Plans a config: surveys what there is to compile, compiles it, adds it up."""

from collections.abc import Callable, Iterable, Sequence
import functools
import json
import math
import time
from typing import Any

from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import validation
from ma_rlhf_jax.parallel.mesh import mesh_shape
from ma_rlhf_jax.planning import (
    abstract,
    buffers,
    compiling,
    estimate,
    plans,
    roofline,
    traps,
)
from ma_rlhf_jax.planning.compiling import Child, Compiled
from ma_rlhf_jax.planning.topology import GIB, Topology

_STAGES = ('sft', 'reward_model', 'ppo')
# Blocks that only the programs of one stage read.
_ONLY_PPO = ('critic', 'macro', 'rollout', 'evaluate')
# Fields of which what stays on a device does not depend.
PASSES = (
    'sft.micro_batch_size',
    'reward_model.micro_batch_size',
    'ppo.micro_batch_size',
    'rollout.batch_size',
)
# What is surveyed depends on neither.
_SURVEYED_ALIKE = (*PASSES, 'model.remat', 'rollout.tensor')
# Fields that the programs which draw responses do not read.
_NOT_DRAWN = ('ppo.micro_batch_size', 'model.remat', 'ppo.one_pass')
# Programs that take longest to compile, or need most, come first: no process
# waits for one at the end, and a misfit shows early.
_HEAVY = ('one_pass', 'update_policy', 'rollout', 'update', 'score')


def whole(config: ConfigDict, field: str) -> int:
  """Rows that one of `PASSES` splits."""
  rows = config.ppo.batch_size * config.ppo.samples_per_prompt
  if field == 'rollout.batch_size':
    return rows
  if field == 'ppo.micro_batch_size':
    return rows // config.ppo.minibatches
  return config[field.partition('.')[0]].batch_size


def _key(config: ConfigDict, left_out: Sequence[str]) -> str:
  """Equal for configs that differ in blocks or fields left out only."""
  flat = config_lib.flatten(config)
  kept = {
      name: value
      for name, value in flat.items()
      if name not in left_out and name.partition('.')[0] not in left_out
  }
  for name in PASSES:
    # Of several minibatches, scoring passes all rows and updates those of one.
    differs = name == 'ppo.micro_batch_size' and config.ppo.minibatches > 1
    if name in kept and not differs:
      kept[name] = kept[name] or whole(config, name)
  return json.dumps(kept)


def problems(config: ConfigDict, topology: Topology) -> list[str]:
  """What is wrong with a config on that many devices, one line each."""
  try:
    data, fsdp, tensor = mesh_shape(config.mesh, topology.num_devices)
  except ValueError as error:
    return [str(error)]
  found = validation.problems(config, data * fsdp, topology.machine)
  if not topology.can_be_split((data, fsdp, tensor)):
    sizes = 'x'.join(map(str, topology.sizes))
    found.append(
        f'mesh (data, fsdp, tensor) = {(data, fsdp, tensor)} cannot be laid on '
        f'{sizes} chips: each must be the product of some of those axes'
    )
  return found


class Planner:
  """Compiles programs, each once, and plans with them.

  Attributes:
    topology: the machine.
    shares: of its datasheet that programs reach.
    hbm: bytes of a device that a program may have; known after a survey.
  """

  def __init__(
      self,
      topology: Topology,
      *,
      shares: roofline.Shares,
      rows: int | None = None,
      jobs: int = 1,
      full: bool = False,
      say: Callable[[str], None] = lambda text: None,
  ):
    """Nothing is compiled yet.

    Args:
      topology: the machine.
      shares: of its datasheet that programs reach.
      rows: to train on; None = what is known of the data set.
      jobs: compiling processes at once.
      full: compile to machine code.
      say: is told what is going on, one line each time.
    """
    self.topology, self.shares, self._rows = topology, shares, rows
    self._jobs, self._full, self._say = jobs, full, say
    self._surveys: dict[str, dict[str, Any]] = {}
    self._compiled: dict[str, Compiled] = {}
    self.hbm: int | None = None
    if topology.platform == 'gpu':
      self.hbm = int(topology.chip.memory * GIB)

  def rows(self, config: ConfigDict) -> int | None:
    """Rows to train on, where known."""
    return self._rows or abstract.num_rows(config)

  def survey(self, config: ConfigDict) -> dict[str, Any]:
    """What a config compiles and keeps on a device, see `planning.child`."""
    key = _key(config, _SURVEYED_ALIKE)
    if key not in self._surveys:
      child = functools.partial(
          Child,
          config,
          self.topology,
          rows=self.rows(config),
          ask_hbm=self.hbm is None,
          count=self.topology.platform == 'gpu',
      )
      self._say(f'{self.topology.name}: what there is to plan')
      found = []
      compiling.run_all([child], 1, lambda c: found.append(c.survey()) or True)
      self._surveys[key] = found[0]
      self.hbm = self.hbm or found[0]['hbm']
    return self._surveys[key]

  def _program_key(self, config: ConfigDict, name: str) -> str:
    stage = name.partition('/')[0]
    others = [s for s in _STAGES if s != stage] + ['stages']
    others += () if stage == 'ppo' else _ONLY_PPO
    if estimate.is_decode(name):
      others += _NOT_DRAWN
    else:
      others += ['rollout.tensor', 'rollout.batch_size']
    if name == 'ppo/reshard' and config.rollout.tensor:
      others.append('rollout.batch_size')
    return f'{name} {_key(config, others)}'

  def load(self, name: str, config: ConfigDict) -> estimate.Load:
    """What a program takes by formula; on GPUs the kernel is known."""
    topology = self.topology
    return estimate.load(name, config, topology.num_devices, topology.chip)

  def _by_formula(
      self, config: ConfigDict, name: str, facts: dict[str, int]
  ) -> Compiled:
    load = self.load(name, config)
    args = facts['resident_args'] + facts['other_args']
    memory = buffers.Memory(args, int(load.temp), 0)
    wire = load.wire if self.topology.num_devices > 1 else 0.0
    moved = {'hbm_bytes': load.hbm, 'wire': wire, 'waits': load.waits}
    return Compiled(memory, memory.need, **moved, **facts)

  def _compile(
      self,
      config: ConfigDict,
      names: list[str],
      go_on: Callable[[str, Compiled], bool],
  ) -> None:
    """Compiles what is not compiled yet; `go_on` may end it."""
    key = functools.partial(self._program_key, config)
    for name in names:
      if key(name) in self._compiled and not go_on(
          name, self._compiled[key(name)]
      ):
        return
    missing = [name for name in names if key(name) not in self._compiled]
    start, count = time.monotonic(), 0

    def take(child: Child) -> bool:
      nonlocal count
      count += 1
      self._compiled[key(child.program)] = found = child.compiled()
      each = (time.monotonic() - start) / count
      left = each * (len(missing) - count)
      self._say(
          f'{child.program} compiled, {count} of {len(missing)}'
          + (f', about {left:.0f} s left' if left else '')
      )
      return go_on(child.program, found)

    makers = [
        functools.partial(
            Child,
            config,
            self.topology,
            name,
            rows=self.rows(config),
            full=self._full,
        )
        for name in missing
    ]
    compiling.run_all(makers, self._jobs, take)

  def missing(self, config: ConfigDict, names: Iterable[str]) -> int:
    """How many of these programs are not compiled yet."""
    return sum(
        self._program_key(config, name) not in self._compiled for name in names
    )

  def _programs(
      self,
      config: ConfigDict,
      survey: dict[str, Any],
      resident: dict[str, int],
      most: float,
  ) -> dict[str, Compiled]:
    """The programs of all stages, up to one that needs more than `most`."""
    found: dict[str, Compiled] = {}
    if self.topology.platform == 'gpu':
      for stage in survey['stages'].values():
        for name, facts in stage['programs'].items():
          found[name] = self._by_formula(config, name, facts)
      return found

    def take(name: str, compiled: Compiled) -> bool:
      found[name] = compiled
      return plans.need(compiled, resident[name.partition('/')[0]]) <= most

    weight = lambda n: next(
        (i for i, w in enumerate(_HEAVY) if n.endswith(w)), len(_HEAVY)
    )
    names = [n for s in survey['stages'].values() for n in s['programs']]
    self._compile(config, sorted(names, key=weight), take)
    return found

  def plan(
      self, config: ConfigDict, *, stop_at_misfit: bool = False
  ) -> plans.Plan:
    """The plan of a config.

    Args:
      config: see `abstract.with_preset`.
      stop_at_misfit: leave out what is not compiled when a program turns out
        to need too much.
    """
    survey = self.survey(config)
    resident = {
        name: sum(stage['resident'].values())
        for name, stage in survey['stages'].items()
    }
    most = plans.MARGIN * self.hbm if stop_at_misfit else math.inf
    found = self._programs(config, survey, resident, most)
    stages = [
        plans.StagePlan(
            name,
            stage['steps'],
            stage['resident'],
            tuple(
                self._program(config, n, found[n], resident[name])
                for n in stage['programs']
                if n in found
            ),
        )
        for name, stage in survey['stages'].items()
    ]
    return plans.Plan(
        config,
        self.topology,
        self.hbm,
        tuple(stage for stage in stages if stage.programs),
        self.rows(config),
    )

  def _program(
      self, config: ConfigDict, name: str, compiled: Compiled, resident: int
  ) -> plans.ProgramPlan:
    _, _, tensor = mesh_shape(config.mesh, self.topology.num_devices)
    passes, _ = estimate.passes_of(name, config)
    vocab = max((w[0] for w in compiled.weights), default=0)
    found = traps.warnings(compiled, tensor=tensor, passes=passes, vocab=vocab)
    return plans.ProgramPlan(
        name,
        compiled,
        plans.need(compiled, resident),
        roofline.seconds(compiled, self.topology, self.shares),
        tuple(found),
    )
