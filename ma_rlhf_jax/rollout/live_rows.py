"""The state of a decode loop, and how only the rows that live go on."""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from ma_rlhf_jax.models.cache import Cache
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.structs import Array


@struct.dataclass
class DecodeState:
  """What the decode loop carries.

  Attributes:
    t: int32 scalar, response tokens drawn so far.
    prompt_mask_BP: bool, of the prompts.
    keys_B: one random key a row.
    rows_B: int32, which row of the prompts this one answers.
    hidden_BD: hidden state from which token t is drawn.
    cache: keys and values of the prompt and of tokens before t.
    limits_B: int32, tokens after which a row is cut; None = none is.
    done_B: bool, rows that have ended: by EOS, or cut.
    tokens_BT: drawn tokens, pad id elsewhere.
    mask_BT: bool, drawn tokens.
    logprobs_BT: nats, under the distribution drawn from.
    kept_mass_BT: mass that the filters left.
  """

  t: Array
  prompt_mask_BP: Array
  keys_B: Array
  rows_B: Array
  hidden_BD: Array
  cache: Cache
  done_B: Array
  tokens_BT: Array
  mask_BT: Array
  logprobs_BT: Array
  kept_mass_BT: Array
  limits_B: Array | None = None


def _rows_axis(state: DecodeState) -> Callable[[Callable], DecodeState]:
  """Maps a function of (array, axis of its rows) over all arrays with rows."""
  stacked = not isinstance(state.cache.keys_XBSKH, tuple)

  def over(function: Callable[[Array, int], Array], *others: Any) -> Any:
    cache = jax.tree.map(
        lambda *x: function(*x, int(stacked)),
        state.cache,
        *(other.cache for other in others),
    )
    bare = lambda tree: tree.replace(cache=None, t=None)
    rest = jax.tree.map(
        lambda *x: function(*x, 0), bare(state), *map(bare, others)
    )
    return rest.replace(cache=cache, t=state.t)

  return over


def _grouped(x: Array, axis: int, groups: int) -> Array:
  """[..., B, ...] -> [..., groups, B / groups, ...]."""
  shape = x.shape
  rows = (groups, shape[axis] // groups)
  return x.reshape(*shape[:axis], *rows, *shape[axis + 1 :])


def _merged(x: Array, axis: int) -> Array:
  """The inverse of `_grouped`."""
  shape = x.shape
  rows = shape[axis] * shape[axis + 1]
  return x.reshape(*shape[:axis], rows, *shape[axis + 2 :])


def _take(x: Array, place_GR: Array, axis: int) -> Array:
  """Rows of each group in another order."""
  grouped = _grouped(x, axis, place_GR.shape[0])
  take = jax.vmap(lambda x, i: jnp.take(x, i, axis=axis), (axis, 0), axis)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    take = jax.vmap(lambda x, i: x[i])
  return _merged(take(grouped, place_GR), axis)


def _on_first(
    size: int,
    function: Callable[[DecodeState], DecodeState],
    groups: int,
    *,
    whole: bool,
) -> Callable[[DecodeState], DecodeState]:
  """`function` on the first `size` rows of each group; `whole`: on all."""
  if whole:
    return function

  def first(x: Array, axis: int) -> Array:
    grouped = _grouped(x, axis, groups)
    return _merged(jax.lax.slice_in_dim(grouped, 0, size, axis=axis + 1), axis)

  def put(x: Array, new: Array, axis: int) -> Array:
    at = (slice(None),) * (axis + 1) + (slice(0, size),)
    grouped = _grouped(x, axis, groups)
    return _merged(grouped.at[at].set(_grouped(new, axis, groups)), axis)

  def branch(state: DecodeState) -> DecodeState:
    over = _rows_axis(state)
    new = function(over(first))
    return over(put, new).replace(t=new.t)

  return branch


def run(
    function: Callable[[DecodeState], DecodeState],
    state: DecodeState,
    *,
    most: int,
) -> DecodeState:
  """`function(state)`, computed on the rows that have not ended alone.

  They go to the front, and the smallest of a few batch sizes that holds them
  goes on: all rows, a half, ..., down to 1 / `most` of them. Rows stay on
  their devices.

  Args:
    function: changes rows that have not ended, each on its own.
    state: of B rows.
    most: a power of two; 1 = always all rows.
  """
  groups = partition.row_groups(state.done_B.shape[0], state.cache.num_kv_heads)
  rows = state.done_B.shape[0] // groups
  sizes = sorted({max(1, rows // part) for part in _powers(most)}, reverse=True)
  if len(sizes) == 1:
    return function(state)
  done_GR = state.done_B.reshape(groups, rows)
  place_GR = jnp.argsort(done_GR, axis=1, stable=True)
  state = _rows_axis(state)(lambda x, axis: _take(x, place_GR, axis))
  live = jnp.max(jnp.sum(~done_GR, axis=1, dtype=jnp.int32))

  branches = [
      _on_first(size, function, groups, whole=size == rows) for size in sizes
  ]
  smaller = jnp.array(sizes[1:], jnp.int32)
  index = jnp.sum(live <= smaller, dtype=jnp.int32)
  return jax.lax.switch(index, branches, state)


def _powers(most: int) -> list[int]:
  """1, 2, 4, ..., `most`."""
  return [2**i for i in range(most.bit_length())]


def in_order(state: DecodeState) -> DecodeState:
  """What was drawn (the cache is dropped), in the order of the prompts."""
  place_B = jnp.argsort(state.rows_B)
  state = state.replace(cache=None, keys_B=None)
  order = lambda x: x[place_B] if x.ndim else x
  return jax.tree.map(order, state)
