"""Whether trained states are fit to be saved: finite, and of a sound size.

Losses tell of an update what the weights before it gave; an update that ruins
the critic, or the last one, shows in no metric. So the states themselves are
looked at before each save, and before a stage hands them on.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ma_rlhf_jax.structs import Array

# The largest weight of a sound model. Those of Gemma are below 1e3, matrices
# below 10: behind a norm, a matrix of larger ones saturates every softmax and
# activation after it, and nothing is learned from there on. Adam moves a
# weight by about the learning rate, so no sound rate leads there either.
LARGEST_WEIGHT = 1e4


class RuinedError(FloatingPointError):
  """A trained state is not finite, or its weights have grown beyond bounds.

  `what` says which and where, without what follows from it.
  """

  def __init__(
      self, stage: str, step: int, problem: str, checkpoint: str
  ) -> None:
    self.what = f'{stage} step {step}: {problem}'
    super().__init__(
        f'{self.what}; this is neither saved nor exported. '
        f'Last good checkpoint: {checkpoint}. Starting again repeats the same '
        'step; try a smaller optim.lr, a smaller optim.clip_norm or '
        "model.dtype='float32' in a new --workdir"
    )


@jax.jit
def _largest(leaves: list[Array]) -> list[Array]:
  """The largest absolute value of each array; nan where one is not finite."""
  largest = lambda x: jnp.max(jnp.abs(x), initial=0).astype(jnp.float32)
  # A maximum over devices may lose a nan.
  return [
      jnp.where(jnp.all(jnp.isfinite(x)), largest(x), jnp.nan) for x in leaves
  ]


def problem(states: dict[str, Any]) -> str:
  """What is wrong with trained states, in words; '' = nothing.

  All arrays are read once, on their devices, by one program; the answer is the
  same on every process, and each must ask.

  Args:
    states: as `Stage.states`: train states, and scalars beside them.
  """
  named = [
      (jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(states)
      if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  found = jax.device_get(_largest([leaf for _, leaf in named]))
  largest = {name: float(x) for (name, _), x in zip(named, found, strict=True)}
  bad = [name for name, x in largest.items() if not math.isfinite(x)]
  if bad:
    return f'{_first(bad)} nan or infinite'
  huge = {
      name: x
      for name, x in largest.items()
      if name.split('/')[1:2] == ['params'] and x > LARGEST_WEIGHT
  }
  if not huge:
    return ''
  return (
      f'{_first(list(huge))} ruined: the largest weight is '
      f'{max(huge.values()):.3g}, where those of a sound model are below '
      f'{LARGEST_WEIGHT:.0e}'
  )


def _first(names: list[str]) -> str:
  """The first of some arrays, and how many more."""
  more = f' and {len(names) - 1} more arrays are' if len(names) > 1 else ' is'
  return names[0] + more
