"""No computing on padding: rows sorted by length, in a few static widths.

  lengths 900 300 200 ... -> [900 x 1]  width 1,024, few rows
                             [300, 200] width 384, more rows
                             ...

A micro-batch of any width holds as many tokens, so narrow ones hold more rows.
The loop over them is part of the program: it has one branch for each width, so
nothing is compiled again and the host is never asked for lengths.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.structs import Array

# Widths, as parts of the longest: closer together where most rows are.
_PARTS = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
# Shorter rows than this are not worth a program for each width.
_WORTH = 512


class Buckets(NamedTuple):
  """The widths of micro-batches; hashable.

  Attributes:
    widths: columns, ascending; the last one holds every row.
    sizes: rows of a micro-batch of each width.
  """

  widths: tuple[int, ...]
  sizes: tuple[int, ...]


def make_buckets(
    length: int, rows: int, micro_rows: int, *, count: int, groups: int
) -> Buckets:
  """Buckets for `rows` sequences of at most `length` tokens.

  Args:
    length: L.
    rows: B.
    micro_rows: sequences of the full length in a micro-batch; 0 = all rows,
      or, with several widths, a sixteenth of them.
    count: widths; 1 = all rows at full length, 0 = six from 512 columns on.
    groups: devices that share a batch; divides all sizes.
  """
  count = count or (len(_PARTS) if length >= _WORTH else 1)
  parts = _PARTS if count == len(_PARTS) else [
      (i + 1) / count for i in range(count)
  ]  # fmt: skip
  widths = sorted({min(length, 8 * math.ceil(length * p / 8)) for p in parts})
  if len(widths) == 1:
    return Buckets((length,), (micro_rows or rows,))
  micro_rows = micro_rows or max(groups, rows // 16)
  most = lambda width: min(rows, micro_rows * length // width)
  size = lambda width: max(groups, most(width) // groups * groups)
  return Buckets(tuple(widths), tuple(map(size, widths)))


def run(
    buckets: Buckets,
    function: Callable[..., tuple[Any, Any]],
    rows: Any,
    lengths_B: Array,
) -> tuple[Any, Any]:
  """Sums, and results by row, of a function of micro-batches.

  Args:
    buckets: the widths.
    function: (rows, width=) -> (sums, results by row). The width is None where
      there is but one. A micro-batch may be filled up with rows of zeros, whose
      masks are false.
    rows: a tree of arrays [B, ...].
    lengths_B: int32, real tokens of each row.

  Returns:
    The sums, in float32 or wider while they are summed, and the results [B,
    ...] in the order of the rows.
  """
  num = lengths_B.shape[0] // buckets.sizes[0]
  if len(buckets.widths) == 1 and num == 1:
    return function(rows, width=None)
  # Jitted, it is traced once for its shapes and for the loop.
  function = jax.jit(function, static_argnames='width', inline=True)
  if len(buckets.widths) > 1:
    return _by_width(buckets, function, rows, lengths_B)
  function = functools.partial(function, width=None)
  micro = partition.micro_batches(rows, num)
  sums, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], micro))

  def step(total: Any, one: Any) -> tuple[Any, Any]:
    new, made = function(one)
    return jax.tree.map(jnp.add, total, new), made

  total, made = jax.lax.scan(step, _zeros(sums), micro)
  return _cast(total, sums), partition.merge_micro_batches(made)


def _zeros(shapes: Any) -> Any:
  """A bfloat16 sum would stop growing after a few hundred terms."""
  return jax.tree.map(
      lambda x: jnp.zeros(x.shape, masking.wide(x.dtype)), shapes
  )


def _cast(tree: Any, like: Any) -> Any:
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _dealt(lengths_B: Array, groups: int) -> tuple[Array, Array]:
  """Rows by falling length, dealt to the groups like cards.

  Returns:
    which_GK: the row at each place of each group.
    longest_K: the longest row at each place.
  """
  order_B = jnp.argsort(-lengths_B, stable=True)
  which_GK = order_B.reshape(-1, groups).T
  return which_GK, lengths_B[which_GK[0]]


def computed_tokens(
    buckets: Buckets, lengths_B: Sequence[int], groups: int = 1
) -> int:
  """Columns that `run` computes for rows of these lengths, padding included."""
  if len(buckets.widths) == 1:
    return len(lengths_B) * buckets.widths[0]
  longest = sorted(lengths_B, reverse=True)[::groups]
  place = total = 0
  while place < len(longest):
    index = sum(longest[place] > width for width in buckets.widths)
    place += buckets.sizes[index] // groups
    total += buckets.widths[index] * buckets.sizes[index]
  return total


def _by_width(
    buckets: Buckets,
    function: Callable[..., tuple[Any, Any]],
    rows: Any,
    lengths_B: Array,
) -> tuple[Any, Any]:
  groups = partition.batch_groups(lengths_B.shape[0])
  sizes = [size // groups for size in buckets.sizes]
  which_GK, longest_K = _dealt(lengths_B, groups)
  places = longest_K.shape[0]
  # Reaching past the end then finds rows of zeros.
  fill = lambda x: jnp.pad(
      x, [(0, 0), (0, max(sizes))] + [(0, 0)] * (x.ndim - 2)
  )
  dealt = jax.tree.map(
      lambda x: fill(partition.constrain_rows(x[which_GK])), rows
  )

  def micro(place: Array, size: int) -> Any:
    take = lambda x: jax.lax.dynamic_slice_in_dim(x, place, size, axis=1)
    merge = lambda x: partition.constrain_rows(x.reshape(-1, *x.shape[2:]))
    return jax.tree.map(lambda x: merge(take(x)), dealt)

  widest = functools.partial(function, width=buckets.widths[-1])
  sums, made = jax.eval_shape(widest, jax.eval_shape(
      functools.partial(micro, size=sizes[-1]), jnp.int32(0)
  ))  # fmt: skip
  shape = lambda x: (groups, places + max(sizes), *x.shape[1:])
  results = jax.tree.map(
      lambda x: partition.constrain_rows(jnp.zeros(shape(x), x.dtype)), made
  )

  def branch(width: int, size: int) -> Callable[[Any], Any]:
    def one(carry: Any) -> Any:
      place, total, results = carry
      new, made = function(micro(place, size), width=width)
      put = lambda whole, x: jax.lax.dynamic_update_slice_in_dim(
          whole, x.reshape(groups, size, *x.shape[1:]), place, axis=1
      )
      total = jax.tree.map(jnp.add, total, new)
      return place + size, total, jax.tree.map(put, results, made)

    return one

  branches = [
      branch(width, size)
      for width, size in zip(buckets.widths, sizes, strict=True)
  ]
  widths = jnp.asarray(buckets.widths, jnp.int32)

  def step(carry: Any) -> Any:
    index = jnp.sum(longest_K[carry[0]] > widths, dtype=jnp.int32)
    return jax.lax.switch(index, branches, carry)

  _, total, results = jax.lax.while_loop(
      lambda carry: carry[0] < places,
      step,
      (jnp.int32(0), _zeros(sums), results),
  )
  back_B = jnp.argsort(which_GK.reshape(-1))
  in_order = lambda x: partition.constrain_rows(
      x[:, :places].reshape(-1, *x.shape[2:])[back_B]
  )
  return _cast(total, sums), jax.tree.map(in_order, results)
