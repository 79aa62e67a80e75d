"""What a run would take on a machine: per program, per stage, and in all."""

import dataclasses

from ml_collections import ConfigDict

from ma_rlhf_jax.planning.compiling import Compiled
from ma_rlhf_jax.planning.roofline import Seconds
from ma_rlhf_jax.planning.topology import Topology

# Of the memory that a compiler grants; what fragments is not modelled.
MARGIN = 0.92


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
  """One program of a stage.

  Attributes:
    name: as in `Stage.programs`.
    compiled: what it does to a device.
    need: bytes of a device while it runs, all that stays there included.
    seconds: of one step.
    warnings: traps that it fell into.
  """

  name: str
  compiled: Compiled
  need: int
  seconds: Seconds
  warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """One stage of a run.

  Attributes:
    name: of the stage.
    steps: updates in all.
    resident: bytes of a device that stay, by model.
    programs: in the order of a step.
  """

  name: str
  steps: int
  resident: dict[str, int]
  programs: tuple[ProgramPlan, ...]

  @property
  def seconds(self) -> float:
    """Of one step."""
    return sum(p.seconds.total for p in self.programs)

  @property
  def counted(self) -> bool:
    """Whether its seconds follow from what the compiler wrote."""
    return not any(p.compiled.doubts for p in self.programs)

  @property
  def peak(self) -> ProgramPlan:
    """The program that needs most."""
    return max(self.programs, key=lambda p: p.need)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run on a machine.

  Attributes:
    config: of the run.
    topology: the machine.
    hbm: bytes of a device that a program may have.
    stages: in order.
    rows: to train on; None = unknown.
  """

  config: ConfigDict
  topology: Topology
  hbm: int
  stages: tuple[StagePlan, ...]
  rows: int | None

  @property
  def peak(self) -> int:
    """Bytes of a device that the run needs."""
    return max(stage.peak.need for stage in self.stages)

  @property
  def fits(self) -> bool:
    """Whether it does, with a margin."""
    return self.peak <= MARGIN * self.hbm

  @property
  def seconds(self) -> float:
    """Of all steps of all stages."""
    return sum(stage.steps * stage.seconds for stage in self.stages)

  @property
  def counted(self) -> bool:
    """Whether its seconds follow from what the compiler wrote."""
    return all(stage.counted for stage in self.stages)

  def misfits(self) -> list[str]:
    """Names of the programs that need too much."""
    return [
        program.name
        for stage in self.stages
        for program in stage.programs
        if program.need > MARGIN * self.hbm
    ]


def need(compiled: Compiled, resident: int) -> int:
  """Bytes of a device while a program runs and all that stays, stays.

  What their tiles pad is what the compiler counts of arguments beyond their
  sizes.
  """
  if compiled.memory is None:
    return resident + max(0, compiled.required - compiled.resident_args)
  m = compiled.memory
  padding = max(0, m.args - compiled.resident_args - compiled.other_args)
  return resident + padding + compiled.other_args + m.temp + m.out
