"""What the chips of TPUs and GPUs can do, by their datasheets."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
  """The datasheet of one device as JAX sees it.

  Attributes:
    flops: dense bfloat16 FLOP/s.
    hbm: bytes/s of its memory.
    link: bytes/s of one link, one way.
    memory: GiB that a program may use; of a TPU the compiler is asked instead.
    dims: axes of the network between chips; 0 = a switch.
    per_chip: devices on one chip, which is what is paid for.
    capability: CUDA compute capability; None on TPUs.
  """

  flops: float
  hbm: float
  link: float
  memory: float
  dims: int = 0
  per_chip: int = 1
  capability: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Shares:
  """Which share of the datasheet a program reaches.

  Attributes:
    compute: of bfloat16 FLOP/s. Published training runs: 0.38 to 0.65.
    hbm: of the bytes/s of HBM. Published decoding: 0.45 to 0.6; copies 0.9.
    wire: of the bytes/s of all links that a collective can use.
  """

  compute: float = 0.45
  hbm: float = 0.6
  wire: float = 0.7


# docs.cloud.google.com/tpu/docs and the scaling book (jax-ml.github.io); one
# way per link. A chip of tpu7x is two devices, each with half of it.
TPUS = {
    'v4': Chip(275e12, 1200e9, 45e9, 30.75, dims=3),
    'v5e': Chip(197e12, 819e9, 50e9, 15.75, dims=2),
    'v5p': Chip(459e12, 2765e9, 100e9, 95.73, dims=3),
    'v6e': Chip(918e12, 1638e9, 100e9, 31.24, dims=2),
    'tpu7x': Chip(1153.5e12, 3690e9, 50e9, 94.74, dims=3, per_chip=2),
}

# NVIDIA's datasheets: dense bfloat16, NVLink (PCIe on l4, l40s and rtx4090)
# one way; memory as nvidia-smi counts it less 0.75 GiB of context and cuBLAS.
GPUS = {
    'b200': Chip(2250e12, 8000e9, 900e9, 178.0, capability=(10, 0)),
    'h200': Chip(989e12, 4800e9, 450e9, 139.6, capability=(9, 0)),
    'h100': Chip(989e12, 3350e9, 450e9, 78.9, capability=(9, 0)),
    'a100': Chip(312e12, 2039e9, 300e9, 79.2, capability=(8, 0)),
    'a100-40': Chip(312e12, 1555e9, 300e9, 39.2, capability=(8, 0)),
    'l40s': Chip(362e12, 864e9, 32e9, 44.2, capability=(8, 9)),
    'rtx4090': Chip(165e12, 1008e9, 32e9, 23.2, capability=(8, 9)),
    'l4': Chip(121e12, 300e9, 32e9, 21.7, capability=(8, 9)),
}

# `device_kind` as JAX names it, or a part of it -> key of the tables; the first
# that is found in the name counts.
_KINDS = {
    'TPU v4': 'v4',
    'TPU v5 lite': 'v5e',
    'TPU v5e': 'v5e',
    'TPU v5': 'v5p',
    'TPU v6': 'v6e',
    'TPU7x': 'tpu7x',
    'B200': 'b200',
    'H200': 'h200',
    'H100': 'h100',
    'A100-SXM4-40GB': 'a100-40',
    'A100-PCIE-40GB': 'a100-40',
    'A100': 'a100',
    'L40S': 'l40s',
    'RTX 4090': 'rtx4090',
    'L4': 'l4',
}

# What a chip waits for its neighbour, about: jax-ml.github.io/scaling-book,
# "Sharded Matrices". To start a collective counts as one hop more.
HOP_SECONDS = 1e-6
# Through a switch, assumed: NCCL's small all-reduces take 10 to 20 us in a box.
SWITCH_SECONDS = 15e-6


def of_device(device: Any) -> Chip:
  """The datasheet of a `jax.Device`; that of a v5e where it is unknown."""
  kind = device.device_kind
  name = next((name for part, name in _KINDS.items() if part in kind), 'v5e')
  return (TPUS | GPUS)[name]


def latency(chip: Chip, group: int, *, rounds: int = 1) -> float:
  """Seconds that a collective takes however little it sends.

  Args:
    chip: joined to others of its kind.
    group: devices that take part, taken as a square or cube of neighbours.
    rounds: how often something crosses the group: twice in an all-reduce.
  """
  if group < 2:
    return 0.0
  if not chip.dims:
    return SWITCH_SECONDS
  hops = chip.dims * (group ** (1 / chip.dims) - 1)
  return HOP_SECONDS * (1 + rounds * hops)
