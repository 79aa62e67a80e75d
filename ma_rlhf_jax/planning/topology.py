"""Slices of TPUs and boxes of GPUs by name."""

import dataclasses
import itertools
import math
import re

from ma_rlhf_jax.parallel.chips import GPUS, TPUS, Chip
from ma_rlhf_jax.parallel.partition import Machine

GIB = 2**30


_FLAT = '1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'.split()
# The largest product of each family with three axes.
_LARGEST = {
    'v4': (16, 16, 16),
    'v5p': (16, 16, 24),
    'tpu7x': (16, 16, 36),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Some devices of one kind and how they are joined.

  Attributes:
    name: as it was asked for.
    platform: 'tpu' or 'gpu'.
    kind: key of `TPUS` or `GPUS`.
    sizes: chips along each axis.
    chip: its datasheet.
  """

  name: str
  platform: str
  kind: str
  sizes: tuple[int, ...]
  chip: Chip

  @property
  def num_chips(self) -> int:
    """What is paid for."""
    return math.prod(self.sizes)

  @property
  def num_devices(self) -> int:
    return self.num_chips * self.chip.per_chip

  @property
  def machine(self) -> Machine:
    """What kernels ask of it."""
    return Machine(self.platform, self.chip.capability)

  def can_be_split(self, mesh: tuple[int, ...]) -> bool:
    """Whether `jax.make_mesh` can lay axes of such sizes on the chips.

    Each takes whole axes of the slice; only a v5e's may be taken apart.
    """
    if self.kind == 'v5e' or not self.chip.dims:
      return True
    axes = [s for s in (*self.sizes, self.chip.per_chip) if s > 1]
    return _splits(tuple(axes), [size for size in mesh if size > 1])

  @property
  def wraps(self) -> tuple[bool, ...]:
    """Which axes are rings: 16 long ones in 2D, in 3D all from 4x4x4 on."""
    if self.chip.dims == 2:
      return tuple(size == 16 for size in self.sizes)
    return (min(self.sizes) >= 4,) * len(self.sizes)

  @property
  def wire(self) -> float:
    """Bytes/s that a device can send and receive along all axes at once.

    Through a line half as many links carry a collective as through a ring.
    """
    if not self.chip.dims:
      return self.chip.link
    links = sum(
        (2 if wrap else 1) if size > 1 else 0
        for size, wrap in zip(self.sizes, self.wraps, strict=True)
    )
    return self.chip.link * max(links, 1)


def _splits(axes: tuple[int, ...], sizes: list[int]) -> bool:
  """Whether each size is the product of axes of its own."""
  if not sizes:
    return not axes
  first, *others = sizes
  for count in range(1, len(axes) + 1):
    for taken in itertools.combinations(range(len(axes)), count):
      if math.prod(axes[i] for i in taken) == first:
        left = (a for i, a in enumerate(axes) if i not in taken)
        if _splits(tuple(left), others):
          return True
  return False


def _known() -> str:
  flat = ', '.join(_FLAT)
  cubes = ', '.join(
      f'{kind}:2x2x1 to {kind}:{"x".join(map(str, most))}'
      for kind, most in _LARGEST.items()
  )
  return (
      f'TPU slices: v5e or v6e with {flat}, as in v5e:4x8; {cubes}. GPUs: '
      f'gpu:KIND:NUMBER with {", ".join(GPUS)}, as in gpu:h200:8'
  )


def _tpu_problem(kind: str, sizes: tuple[int, ...]) -> str:
  """Why there is no such slice; '' if there is."""
  shape = 'x'.join(map(str, sizes))
  if kind in ('v5e', 'v6e'):
    return '' if shape in _FLAT else f'{kind} has no slice {shape}'
  if len(sizes) != 3:
    return f'a slice of {kind} has three axes'
  if any(s > most for s, most in zip(sizes, _LARGEST[kind], strict=True)):
    return f'{kind} ends at {"x".join(map(str, _LARGEST[kind]))}'
  if sizes[0] % 2 or sizes[1] % 2:
    return 'a host has 2x2x1 chips, so the first two axes must be even'
  return ''


def parse(name: str) -> Topology:
  """The topology of that name.

  Raises:
    ValueError: if there is none, with the names that there are.
  """
  kind, _, rest = name.partition(':')
  if kind == 'gpu':
    kind, _, number = rest.partition(':')
    number = number or '1'
    if kind in GPUS and re.fullmatch(r'[1-9][0-9]*', number):
      return Topology(name, 'gpu', kind, (int(number),), GPUS[kind])
    what = f'no GPU {kind!r}' if kind not in GPUS else f'no number {number!r}'
    raise ValueError(f'--topology={name!r}: there is {what}. {_known()}')
  if not name:
    raise ValueError(f'--topology is needed: the machine to plan. {_known()}')
  if kind not in TPUS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', rest):
    raise ValueError(f'--topology={name!r} is unknown. {_known()}')
  sizes = tuple(map(int, rest.split('x')))
  if problem := _tpu_problem(kind, sizes):
    raise ValueError(f'--topology={name!r}: {problem}. {_known()}')
  return Topology(name, 'tpu', kind, sizes, TPUS[kind])
