"""What the numerics of a PPO step are fixed by, and what they are told."""

import dataclasses
import functools

import jax.numpy as jnp

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective.advantage import Objective
from ma_rlhf_jax.ppo.host import HostAnswers
from ma_rlhf_jax.structs import Array, MacroActions, Models, Scored


@dataclasses.dataclass(frozen=True)
class Method:
  """What the numerics of a step are fixed by; hashable.

  Attributes:
    configs: `GemmaConfig` of each of the four models.
    objective: rewards, estimation and losses.
    rule: where macro actions start.
    temperature: of the log-probs in ratio, KL and perplexity.
  """

  configs: Models
  objective: Objective
  rule: termination.TerminationSettings
  temperature: float


def segment(
    mask_BT: Array,
    scored: Scored | None,
    keys_B: Array,
    host: HostAnswers,
    rule: termination.TerminationSettings,
) -> MacroActions:
  """The macro actions of responses.

  Args:
    mask_BT: bool, response tokens.
    scored: of the responses; None where the rule asks no model.
    keys_B: a random key for each row, for random lengths.
    host: its answers, where the rule reads the text.
    rule: of the run.
  """
  logprobs_BT = jnp.zeros(mask_BT.shape)
  if scored is not None:
    named = {'ref': scored.ref_logprobs_BT, 'old': scored.logprobs_BT}
    logprobs_BT = named[rule.logprobs]
  inputs = termination.TerminationInputs(
      mask_BT, logprobs_BT, keys_B, host.starts_BT, scored
  )
  return termination.segment(inputs, rule)


def total_score(scored: Scored, host: HostAnswers) -> Array:
  """[B]: of the reward model, of the reward functions, or both."""
  given = [x for x in (scored.score_B, host.score_B) if x is not None]
  return functools.reduce(jnp.add, given)
