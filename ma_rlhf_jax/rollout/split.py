"""Over how many devices one copy of decoding weights is split.

For every token a device reads its part of the weights and of the cache, and two
sums of activations a layer cross the devices of a copy. More devices to a copy
read less each and wait for more hops.
"""

import dataclasses

from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel import chips

_SHARES = chips.Shares()  # those that plans assume
# Weights and cache may take so much of a device; the rest trains.
_ROOM = 0.5
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Decoding:
  """Rows that are decoded at once.

  Attributes:
    config: the shape of the policy.
    mesh: devices along (data, fsdp, tensor) in training.
    rows: on all devices.
    columns: prompt and response tokens of a row.
  """

  config: GemmaConfig
  mesh: tuple[int, int, int]
  rows: int
  columns: int

  @property
  def choices(self) -> list[int]:
    """Devices that may share a copy: those that training's mesh allows."""
    _, fsdp, tensor = self.mesh
    return [
        n
        for n in range(tensor, fsdp * tensor + 1)
        if fsdp * tensor % n == 0 and self.config.num_heads % n == 0
    ] or [tensor]

  def rows_of(self, split: int) -> float:
    """Rows that the devices of one copy decode together."""
    data, fsdp, tensor = self.mesh
    return max(1.0, self.rows * split / (data * fsdp * tensor))

  def weights(self, split: int) -> float:
    """Bytes of a device."""
    return self.config.num_params * self.config.compute_dtype.itemsize / split

  def cache(self, split: int) -> float:
    """Bytes of a device; heads lie apart, a single one is split by rows."""
    c = self.config
    token = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    token *= c.compute_dtype.itemsize
    parts = split if c.num_kv_heads == 1 or c.num_kv_heads % split == 0 else 1
    return self.rows_of(split) * self.columns * token / parts


def latency(config: GemmaConfig, chip: chips.Chip, split: int) -> float:
  """Seconds that a token waits for its collectives, however small they are.

  Args:
    config: the shape of the policy.
    chip: of the devices.
    split: devices to one copy of the weights.
  """
  sums = 2 * config.num_layers + 1  # of a layer's two halves, of the table
  # Of choosing a token among the parts of the vocabulary, 30 when compiled.
  return sums * chips.latency(chip, split, rounds=2) + 30 * chips.latency(
      chip, split
  )


def token_seconds(work: Decoding, chip: chips.Chip, split: int) -> float:
  """Of one token of all rows.

  Args:
    work: what is decoded.
    chip: of the devices.
    split: devices to one copy of the weights.
  """
  c = work.config
  read = work.weights(split) + 0.75 * work.cache(split)
  sums = work.rows_of(split) * c.embed_dim * c.compute_dtype.itemsize
  sent = 2 * (2 * c.num_layers + 1) * sums * (split - 1) / split
  return (
      read / (chip.hbm * _SHARES.hbm)
      + sent / (chip.link * _SHARES.wire)
      + latency(c, chip, split)
  )


def fastest(work: Decoding, chip: chips.Chip) -> int:
  """Devices to one copy of the weights that draw a token soonest.

  Of those where weights and cache take at most half of a device; where they
  never do, as many as there can be.

  Args:
    work: what is decoded.
    chip: of the devices.
  """
  room = _ROOM * chip.memory * _GIB
  fit = [n for n in work.choices if work.weights(n) + work.cache(n) <= room]
  seconds = lambda n: token_seconds(work, chip, n)
  return min(fit, key=seconds, default=max(work.choices))
