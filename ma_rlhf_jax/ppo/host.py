"""What a step asks the host: it reads the text of responses."""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

from flax import struct
import jax
from jax.sharding import Mesh
import numpy as np

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import host as host_rules
from ma_rlhf_jax.parallel.mesh import own_part, place
from ma_rlhf_jax.structs import Array, PromptBatch, Rollout

# (tokens_BT, mask_BT) -> starts_BT and counts by row; see `macro.host`.
TextRule = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, dict]]
# (rows of the data set [B], tokens_BT, mask_BT) -> float32 [B].
RowReward = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
_rule_metrics = jax.jit(host_rules.metrics)


@struct.dataclass
class HostAnswers:
  """What the host says about responses; None where it was not asked.

  Attributes:
    starts_BT: bool, true where its rule opens a macro action.
    score_B: float, reward-model units, of the reward functions.
  """

  starts_BT: Array | None = None
  score_B: Array | None = None


class Asked(NamedTuple):
  """Answers, and the metrics of the step that come with them."""

  answers: HostAnswers
  metrics: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Host:
  """What is asked; each host reads the rows of its own devices.

  Attributes:
    rule: where macro actions start; None = the devices decide.
    reward: of a response; None = the reward model alone.
  """

  rule: TextRule | None = None
  reward: RowReward | None = None

  def ask(self, prompts: PromptBatch, rollout: Rollout, mesh: Mesh) -> Asked:
    """Asks about the responses of a rollout on the devices of `mesh`."""
    if self.rule is None and self.reward is None:
      return Asked(HostAnswers(), {})
    rows = rollout.sequences
    own = lambda x: own_part(x, mesh)
    tokens_BT = own(masking.response_tokens(rows))
    mask_BT = own(rows.response_mask_BT)
    starts_BT = score_B = counts_B = None
    if self.rule is not None:
      starts_BT, counts_B = self.rule(tokens_BT, mask_BT)
    if self.reward is not None:
      score_B = self.reward(own(prompts.prompt_ids_B), tokens_BT, mask_BT)
    answers, counts_B = place(
        (HostAnswers(starts_BT, score_B), counts_B or {}),
        mesh,
        rows.mask_BL.shape[0],
    )
    return Asked(answers, _rule_metrics(counts_B))
