"""One optimizer update: accumulated gradients, then the optimizer."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
import numpy as np
import optax

from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.structs import Array, Params, TrainState
from ma_rlhf_jax.training import buckets, optim

# loss_fn(params, batch) -> (loss, metrics), both SUMS over the rows of the
# batch whose weights were fixed for the whole minibatch, so that the sums of
# micro-batches are those of the minibatch.
LossFn = Callable[[Params, Any], tuple[Array, dict[str, Array]]]


def init_state(
    params: Params, optimizer: optax.GradientTransformation
) -> TrainState:
  """The state before the first update; moments lie where their params lie.

  Args:
    params: arrays, or `jax.ShapeDtypeStruct` for a state of such.
    optimizer: of this model.
  """
  init = jax.jit(optimizer.init)
  if _is_abstract(params):
    init = functools.partial(jax.eval_shape, optimizer.init)
  return TrainState(
      step=on_mesh_of(params, np.zeros((), np.int32)),
      params=params,
      opt_state=optax.tree.map_params(
          optimizer,
          lambda moment, param: _put(moment, param.sharding),
          init(params),
          params,
          transform_non_params=lambda x: on_mesh_of(params, x),
      ),
  )


def _is_abstract(tree: Any) -> bool:
  return isinstance(jax.tree.leaves(tree)[0], jax.ShapeDtypeStruct)


def _put(x: Array, sharding: Sharding | None) -> Array:
  """`x` where `sharding` says, if anything was decided."""
  if not isinstance(sharding, NamedSharding):
    return x
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.device_put(x, sharding)


def on_mesh_of(params: Params, x: Array | np.ndarray) -> Array:
  """`x` on every device of the mesh of `params`, which need not be here.

  There an update leaves it, so that the second finds its program compiled.
  """
  if _is_abstract(params):
    x = jax.ShapeDtypeStruct(x.shape, x.dtype)
  elif isinstance(x, np.ndarray):
    x = jnp.asarray(x)
  sharding = jax.tree.leaves(params)[0].sharding
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, PartitionSpec())
  return _put(x, sharding)


def accumulate_gradients(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    num_micro: int = 1,
    *,
    by_length: tuple[buckets.Buckets, Array] | None = None,
) -> tuple[Params, dict[str, Array]]:
  """The gradient and metrics of the whole batch, one micro-batch at a time.

  Args:
    loss_fn: a sum over rows, see `LossFn`; with `by_length` it takes the
      `width` of the micro-batch too.
    params: the parameters to differentiate by.
    batch: arrays [B, ...].
    num_micro: micro-batches; divides B.
    by_length: in place of `num_micro`, the widths of micro-batches, and int32
      [B], the real tokens of each row.

  Returns:
    Gradients and metrics (with 'loss'), equal to those of one large batch up
    to the order of float sums. On a mesh each gradient, and each sum of some,
    is split as its parameter is.
  """
  rows = jax.tree.leaves(batch)[0].shape[0]
  whole = buckets.Buckets((0,), (rows // num_micro,))
  split, lengths_B = by_length or (whole, jnp.zeros(rows, jnp.int32))

  def one(micro: Any, width: int | None) -> tuple[Any, tuple]:
    how = {} if by_length is None else {'width': width}
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, metrics), grads = grad_fn(params, micro, **how)
    return (partition.constrain_params(grads), {'loss': loss, **metrics}), ()

  sums, _ = buckets.run(split, one, batch, lengths_B)
  return sums


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Array]]:
  """The state after one update, and its `grad_norm` (before clipping)."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new_state = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
  )
  return new_state, {'grad_norm': optim.global_norm(grads)}


def train_step(
    state: TrainState,
    batch: Any,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_micro: int = 1,
    by_length: tuple[buckets.Buckets, Array] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
  """One update on one minibatch; see `accumulate_gradients`."""
  with jax.named_scope('update'):
    grads, metrics = accumulate_gradients(
        loss_fn, state.params, batch, num_micro, by_length=by_length
    )
    state, norms = apply_gradients(state, grads, optimizer)
  return state, {**metrics, **norms}


def num_micro(batch_size: int, micro_batch_size: int) -> int:
  """Micro-batches of a batch; a micro-batch size of 0 is the whole batch."""
  return batch_size // (micro_batch_size or batch_size)
