"""One step of MA-PPO, in order: arXiv 2410.02743, algorithm 1.

  prompts -> rollout -> host -> scores -> macro actions -> token rewards ->
  advantages and returns -> losses -> updates -> kl_coef -> metrics

`take` is what the host does. `form_experience` and `losses` are what the
devices compute on the way, as parts of the programs in `ppo.programs`: with one
update a rollout, one program scores, forms the experience and learns in the
same forward pass; else they are programs of their own.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import losses as losses_lib
from ma_rlhf_jax.objective import rewards, targets
from ma_rlhf_jax.objective.settings import Objective
from ma_rlhf_jax.ppo.host import HostAnswers
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    LossWeights,
    MacroActions,
    Models,
    PromptBatch,
    Rollout,
    Scored,
    SequenceBatch,
)

if TYPE_CHECKING:
  from ma_rlhf_jax.ppo.programs import Programs

States = dict[str, Any]
Metrics = dict[str, Array]


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


def take(
    p: 'Programs', states: States, prompts: PromptBatch, index: int
) -> tuple[States, Metrics]:
  """The states after step number `index`, and its metrics."""
  rollout = respond(p, states, prompts, index)
  return learn(p, states, prompts, rollout, index)


def respond(
    p: 'Programs', states: States, prompts: PromptBatch, index: int
) -> Rollout:
  """Samples a response to each prompt from the policy."""
  with jax.profiler.TraceAnnotation('rollout'):
    policy = p.to_decode(p.models(states).policy)
    return p.rollout(policy, prompts, p.spec.key('rollout'), index)


def learn(
    p: 'Programs',
    states: States,
    prompts: PromptBatch,
    rollout: Rollout,
    index: int,
) -> tuple[States, Metrics]:
  """Updates critic and policy; the critic alone while it warms up."""
  trained, fused = p.trained(index), p.fused(index)
  keys_B, kl_coef = p.macro_keys(prompts, index), states['kl_coef']
  if fused:
    asked = p.ask_host(prompts, rollout)
    with jax.profiler.TraceAnnotation('one_pass'):
      new, experience, metrics, learned = p.score_and_learn(
          states, rollout, keys_B, kl_coef, asked.answers
      )
  else:
    with jax.profiler.TraceAnnotation('score'):
      scored = p.score(states, rollout)
    asked = p.ask_host(prompts, rollout)  # while the devices score
    experience, metrics = p.experience(
        rollout, scored, keys_B, kl_coef, asked.answers
    )
    new, learned = {}, {}
  with jax.profiler.TraceAnnotation('update'):
    for name in trained:
      if name not in fused:
        new[name], learned[name] = p.update(name, states, experience, index)
  if 'policy' in trained:  # else the KL says nothing of the coefficient
    new |= p.adapt_kl(states, metrics)
  metrics |= asked.metrics | p.describe_updates(learned, new)
  return states | new, metrics


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


def form_experience(
    sequences: SequenceBatch,
    scored: Scored,
    keys_B: Array,
    kl_coef: Array,
    host: HostAnswers,
    method: Method,
) -> tuple[Experience, Array]:
  """Macro actions, token rewards, and what policy and critic aim at.

  Args:
    sequences: prompts and responses.
    scored: what the models said about them before the update.
    keys_B: a random key for each row, for random lengths of macro actions.
    kl_coef: scalar, reward-model units per nat.
    host: see there.
    method: of the run.

  Returns:
    The experience, and the token rewards [B, T], reward-model units.
  """
  objective, mask_BT = method.objective, sequences.response_mask_BT
  with jax.named_scope('macro'):
    macro = segment(mask_BT, scored, keys_B, host, method.rule)
    scored = scored.replace(score_B=_score(scored, host))
    rewards_BT = rewards.token_rewards(
        scored.logprobs_BT,
        scored.ref_logprobs_BT,
        scored.score_B,
        mask_BT,
        kl_coef=kl_coef,
        score_clip=objective.score_clip,
    )
    aims = targets.estimate(scored.values_BT, rewards_BT, macro, objective)
  return Experience(sequences, scored, macro, aims), rewards_BT


def _score(scored: Scored, host: HostAnswers) -> Array:
  """[B]: of the reward model, of the host, or both."""
  given = [x for x in (scored.score_B, host.score_B) if x is not None]
  return functools.reduce(jnp.add, given)


def losses(
    new: Scored,
    experience: Experience,
    weights: dict[str, LossWeights],
    objective: Objective,
) -> dict[str, Metrics]:
  """Loss and metrics of each model that has weights, summed over the rows.

  Args:
    new: log-probs and values under the parameters that learn.
    experience: the same of before the update, and the targets. In the first
      update of a rollout both are equal: then those of before are the new ones,
      held fixed.
    weights: of `loss_weights`.
    objective: of the run.
  """
  old, macro, aims = experience.scored, experience.macro, experience.targets
  found = {}
  if 'policy' in weights:
    loss, found['policy'] = losses_lib.policy_loss(
        new.logprobs_BT,
        old.logprobs_BT,
        aims.advantages_BT,
        weights['policy'],
        macro,
        clip_eps=objective.clip_eps,
        ratio=objective.ratio,
    )
    found['policy']['loss'] = loss
  if 'critic' in weights:
    loss, found['critic'] = losses_lib.value_loss(
        new.values_BT,
        old.values_BT,
        aims.returns_BT,
        weights['critic'],
        targets.critic_mask(
            macro.mask_BT, macro.starts_BT, objective.critic_target
        ),
        clip_eps=objective.value_clip_eps,
    )
    found['critic']['loss'] = loss
  return found
