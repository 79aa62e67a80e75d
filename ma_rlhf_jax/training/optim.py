"""AdamW with warm-up, decay and clipping."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from ma_rlhf_jax import masking
from ma_rlhf_jax.structs import Array, Params

SCHEDULES: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    'cosine': lambda lr, final, steps: optax.cosine_decay_schedule(
        lr, steps, alpha=final
    ),
    'linear': lambda lr, final, steps: optax.linear_schedule(
        lr, lr * final, steps
    ),
    'constant': lambda lr, final, steps: optax.constant_schedule(lr),
}


def learning_rate(optim: ConfigDict, num_updates: int) -> optax.Schedule:
  """Linear warm-up from lr / warmup to lr, then the configured decay.

  Args:
    optim: an `optim` block of the config.
    num_updates: optimizer updates of the whole stage.
  """
  warmup = round(optim.warmup_ratio * num_updates)
  steps = max(1, num_updates - warmup)
  decay = SCHEDULES[optim.schedule](optim.lr, optim.final_lr_ratio, steps)
  if not warmup:
    return decay
  ramp = optax.linear_schedule(optim.lr / warmup, optim.lr, warmup - 1 or 1)
  return optax.join_schedules([ramp, decay], [warmup])


def decayed(params: Params) -> Params:
  """True for the leaves that weight decay applies to: all but norm scales."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key != 'scale', params
  )


# The largest decay rate of a moment in bfloat16: see `_adam`.
MAX_ROUNDED_DECAY = 0.98


def _adam(optim: ConfigDict) -> optax.GradientTransformation:
  """`optax.scale_by_adam`, its two moments kept in `moment_dtype`.

  optax gives moments the dtype of their parameter. Here `float32` is float32,
  or wider where the parameter is. All sums of an update are at least float32,
  of bfloat16 parameters and gradients too.

  Moments in `bfloat16` are widened, updated and rounded to the nearest again,
  so that a run is still the same bit for bit each time; nothing is drawn. They
  keep 8 bits and the exponents of float32: small squares do not vanish, but a
  change of a moment by less than 2^-8 to 2^-9 of it is lost. An update changes
  the second moment v by (1 - b2) (g^2 / v - 1) of it. So under gradients of a
  constant square, v comes to rest before it is there:

    b2      after smaller gradients    after larger ones
    0.95    up to 7.2 % below g^2      up to 8.4 % above
    0.98    up to 16 % below g^2       up to 24 % above

  Steps go by the root of v, half of that. With 0.999 it could never decay, so
  decay rates stay at or below `MAX_ROUNDED_DECAY`.
  """
  adam = optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)
  wide = lambda tree: jax.tree.map(
      lambda x: x.astype(masking.wide(x.dtype)), tree
  )

  def rest(tree: Params) -> Params:
    if optim.moment_dtype == 'float32':
      return tree
    return optax.tree.cast(tree, jnp.dtype(optim.moment_dtype))

  def kept(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    return state._replace(mu=rest(state.mu), nu=rest(state.nu))

  def init(params: Params) -> optax.ScaleByAdamState:
    state = adam.init(params)
    return kept(state._replace(mu=wide(state.mu), nu=wide(state.nu)))

  def update(
      grads: Params, state: optax.ScaleByAdamState, params: Params | None = None
  ) -> tuple[Params, optax.ScaleByAdamState]:
    grads = wide(grads)
    as_grads = lambda moments: jax.tree.map(
        lambda m, g: m.astype(g.dtype), moments, grads
    )
    state = state._replace(mu=as_grads(state.mu), nu=as_grads(state.nu))
    updates, state = adam.update(grads, state, params)
    return updates, kept(state)

  return optax.GradientTransformation(init, update)


def global_norm(grads: Params) -> Array:
  """The norm of all gradients together, summed in float32 or wider."""
  return optax.tree.norm(
      jax.tree.map(lambda g: g.astype(masking.wide(g.dtype)), grads)
  )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` by one factor for all gradients.

  A quotient for each entry, as there, XLA writes to memory for the two moments
  that read it: a second copy of all gradients.
  """

  def update(
      grads: Params, state: optax.EmptyState, params: Params | None = None
  ) -> tuple[Params, optax.EmptyState]:
    del params
    norm = global_norm(grads)
    factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def make_optimizer(
    optim: ConfigDict, num_updates: int
) -> optax.GradientTransformation:
  """Clip by the global norm, then AdamW (arXiv 1711.05101).

  Args:
    optim: an `optim` block of the config.
    num_updates: optimizer updates of the whole stage; the schedule ends there.
  """
  adamw = optax.chain(
      _adam(optim),
      optax.add_decayed_weights(optim.weight_decay, mask=decayed),
      optax.scale_by_learning_rate(learning_rate(optim, num_updates)),
  )
  if not optim.clip_norm:
    return adamw
  return optax.chain(clip_by_global_norm(optim.clip_norm), adamw)
