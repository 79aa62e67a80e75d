"""Warnings about what makes a compiled program slow."""

from collections.abc import Iterable, Iterator
import itertools

from ma_rlhf_jax.planning.compiling import Compiled
from ma_rlhf_jax.planning.hlo import Array
from ma_rlhf_jax.planning.topology import GIB
from ma_rlhf_jax.planning.traffic import Collective

# Below this share of what a program sends, a trap is not worth a line.
_WORTH = 0.05


def _forms(shape: tuple[int, ...], tensor: int) -> Iterator[tuple[int, ...]]:
  """Sizes, sorted, that a matrix may have in the compiler's hands."""
  merged = [shape]
  for i in range(len(shape) - 1):
    merged.append((*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]))
  for dims in merged:
    yield tuple(sorted(dims))
    for i, size in enumerate(dims):
      if tensor > 1 and size % tensor == 0:
        yield tuple(sorted((*dims[:i], size // tensor, *dims[i + 1 :])))


def _matches(
    arrays: Iterable[Array], shapes: Iterable[tuple[int, ...]], tensor: int
) -> bool:
  known = set(itertools.chain(*(_forms(shape, tensor) for shape in shapes)))
  return any(
      tuple(sorted(d for d in array.dims if d > 1)) in known for array in arrays
  )


def _gib(found: list[Collective]) -> str:
  return f'{sum(c.total for c in found) / GIB:.3g} GiB'


def warnings(
    program: Compiled, *, tensor: int, passes: int, vocab: int
) -> list[str]:
  """Traps that a program fell into, one line each.

  Args:
    program: compiled.
    tensor: devices along the tensor axis.
    passes: micro-batches of a step; a loop of so many trips over them has to
      gather what it uses.
    vocab: rows of the table.
  """
  table = [w for w in program.weights if vocab in w]
  layers = [w for w in program.weights if vocab not in w]
  is_table = lambda c: _matches(c.arrays, table, tensor)
  is_weight = lambda c: is_table(c) or _matches(c.arrays, layers, tensor)
  early = lambda c: c.in_decode_loop
  inner = lambda c: c.loops and c.loops[-1].trips != passes
  of = lambda kind: [c for c in program.collectives if c.kind == kind]
  gathers = of('all-gather')
  decode = [c for c in program.collectives if early(c)]
  found = {
      'weights are gathered for every token of the decode loop; shard them '
      'over tensor only there': [
          c for c in gathers if early(c) and is_weight(c)
      ],
      'weights or activations are passed around for every token of the '
      'decode loop': [c for c in of('collective-permute') if early(c)],
      'the embedding table is gathered in the loop over chunks of tokens; '
      'gather it once before the loop': [
          c for c in gathers if is_table(c) and inner(c) and not early(c)
      ],
      'gradients of weights are all-reduced in a loop; a reduce-scatter '
      'sends half as much': [
          c for c in of('all-reduce') if c.loops and is_weight(c)
      ],
  }
  lines = []
  for words, sent in found.items():
    if sum(c.total for c in sent) > _WORTH * program.wire:
      lines.append(f'{_gib(sent)} of {program.wire / GIB:.3g} sent: {words}')
  if not lines and sum(c.total for c in decode) > 25 * GIB:
    lines.append(f'the decode loop sends {_gib(decode)}')
  return lines
