"""AdamW with warm-up, decay and clipping."""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict
import optax

from ma_rlhf_jax.structs import Params

_DECAYS: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    'cosine': lambda lr, final, steps: optax.cosine_decay_schedule(
        lr, steps, alpha=final
    ),
    'linear': lambda lr, final, steps: optax.linear_schedule(
        lr, lr * final, steps
    ),
    'constant': lambda lr, final, steps: optax.constant_schedule(lr),
}
SCHEDULES = tuple(_DECAYS)


def learning_rate(optim: ConfigDict, num_updates: int) -> optax.Schedule:
  """Linear warm-up from lr / warmup to lr, then the configured decay.

  Args:
    optim: an `optim` block of the config.
    num_updates: optimizer updates of the whole stage.
  """
  warmup = round(optim.warmup_ratio * num_updates)
  steps = max(1, num_updates - warmup)
  decay = _DECAYS[optim.schedule](optim.lr, optim.final_lr_ratio, steps)
  if not warmup:
    return decay
  ramp = optax.linear_schedule(optim.lr / warmup, optim.lr, warmup - 1 or 1)
  return optax.join_schedules([ramp, decay], [warmup])


def decayed(params: Params) -> Params:
  """True for the leaves that weight decay applies to: all but norm scales."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key != 'scale', params
  )


def make_optimizer(
    optim: ConfigDict, num_updates: int
) -> optax.GradientTransformation:
  """Clip by the global norm, then AdamW (arXiv 1711.05101).

  Args:
    optim: an `optim` block of the config.
    num_updates: optimizer updates of the whole stage; the schedule ends there.
  """
  adamw = optax.adamw(
      learning_rate(optim, num_updates),
      b1=optim.b1,
      b2=optim.b2,
      eps=optim.eps,
      weight_decay=optim.weight_decay,
      mask=decayed,
  )
  if not optim.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)
