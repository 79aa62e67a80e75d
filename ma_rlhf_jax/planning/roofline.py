"""Seconds of a program: the slowest of matmuls, HBM and wire, and what waits.

Lower bounds divided by what good programs reach; nothing here was measured on
the machine that is planned.
"""

import dataclasses

from ma_rlhf_jax.parallel import chips
from ma_rlhf_jax.parallel.chips import Shares
from ma_rlhf_jax.planning.compiling import Compiled
from ma_rlhf_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Seconds:
  """The terms of one execution, seconds.

  Attributes:
    compute: of matrix products.
    hbm: of reading and writing.
    wire: of sending, by bytes.
    latency: of collectives that are waited for, however little they send.
  """

  compute: float
  hbm: float
  wire: float
  latency: float = 0.0

  @property
  def total(self) -> float:
    """The slowest, which hides the others, and the latency, which it cannot."""
    return max(self.compute, self.hbm, self.wire) + self.latency

  @property
  def bound(self) -> str:
    """Name of the slowest term."""
    terms = dataclasses.asdict(self)
    return max(terms, key=terms.get)


def latency(program: Compiled, topology: Topology) -> float:
  """Seconds of all collectives of a program that are waited for."""
  if program.waits is not None:
    return program.waits
  return sum(
      c.waits * chips.latency(topology.chip, c.group, rounds=c.rounds)
      for c in program.collectives
  )


def seconds(program: Compiled, topology: Topology, shares: Shares) -> Seconds:
  """The terms of a program on a topology.

  Args:
    program: FLOPs of all devices, bytes of one.
    topology: where it runs.
    shares: of the datasheet.
  """
  chip = topology.chip
  wire = program.wire if topology.num_devices > 1 else 0
  return Seconds(
      program.flops / (topology.num_devices * chip.flops * shares.compute),
      program.hbm_bytes / (chip.hbm * shares.hbm),
      wire / (topology.wire * shares.wire),
      latency(program, topology) if topology.num_devices > 1 else 0.0,
  )


def assumptions(topology: Topology, shares: Shares) -> list[str]:
  """What the seconds rest on, one line each."""
  chip = topology.chip
  per = ' (half a chip)' if chip.per_chip > 1 else ''
  rings = 'a switch'
  if chip.dims:
    wraps = [
        f'{size} {"ring" if wrap else "line"}'
        for size, wrap in zip(topology.sizes, topology.wraps, strict=True)
        if size > 1
    ]
    rings = ' x '.join(wraps) or 'no links'
  return [
      f'datasheet of a device{per}: {chip.flops / 1e12:g} bfloat16 TFLOP/s, '
      f'HBM {chip.hbm / 1e9:g} GB/s, wire {topology.wire / 1e9:g} GB/s '
      f'({rings})',
      f'reached share: compute {shares.compute:g}, HBM {shares.hbm:g}, wire '
      f'{shares.wire:g} (--shares); the slowest of the three hides the others',
      'a collective that is waited for, however small, takes '
      + (
          f'{chips.HOP_SECONDS * 1e6:g} us and as much for each hop'
          if chip.dims
          else f'{chips.SWITCH_SECONDS * 1e6:g} us'
      )
      + ' on top (assumed)',
      'every response runs to its limit, no columns are dropped as padding; '
      'evaluation, checkpoints, host work and start-up are left out',
  ]
