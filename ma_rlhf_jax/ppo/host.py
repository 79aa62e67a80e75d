"""What a step asks the host: it reads the text of responses."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct
import jax
from jax.sharding import Mesh
import numpy as np

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import host as host_rules
from ma_rlhf_jax.parallel.mesh import own_part, place
from ma_rlhf_jax.structs import Array, Rollout

# (tokens_BT, mask_BT) -> starts_BT and counts by row; see `macro.host`.
TextRule = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, dict]]
_rule_metrics = jax.jit(host_rules.metrics)


@struct.dataclass
class HostAnswers:
  """What the host says about responses; None where it was not asked.

  Attributes:
    starts_BT: bool, true where its rule opens a macro action.
  """

  starts_BT: Array | None = None


class Asked(NamedTuple):
  """Answers, and the metrics of the step that come with them."""

  answers: HostAnswers
  metrics: dict[str, Array]


def ask(rule: TextRule | None, rollout: Rollout, mesh: Mesh) -> Asked:
  """Asks about the responses of a rollout.

  Each host reads the rows of its own devices.

  Args:
    rule: where macro actions start; None = the devices decide.
    rollout: on the devices.
    mesh: of the devices.
  """
  if rule is None:
    return Asked(HostAnswers(), {})
  rows = rollout.sequences
  own = lambda x: own_part(x, mesh)
  made: Any = rule(
      own(masking.response_tokens(rows)), own(rows.response_mask_BT)
  )
  starts_BT, counts_B = place(made, mesh, rows.mask_BL.shape[0])
  return Asked(HostAnswers(starts_BT), _rule_metrics(counts_B))
