"""One step of MA-PPO, in order: arXiv 2410.02743, algorithm 1.

  prompts -> rollout -> the host reads the text -> scores -> macro actions ->
  token rewards -> advantages and returns -> losses -> updates -> KL coefficient

`respond` and `learn` run on the host and call the programs of `ppo.programs`.
`form_experience` is traced into them. Scores, losses and updates: `ppo.learn`.
"""

from typing import Any

import jax

from ma_rlhf_jax.objective import rewards, targets
from ma_rlhf_jax.ppo.host import HostAnswers
from ma_rlhf_jax.ppo.method import Method, segment, total_score
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    PromptBatch,
    Rollout,
    Scored,
    SequenceBatch,
)

Programs = Any  # `ppo.programs.Programs`, which imports this module
States = dict[str, Any]
Metrics = dict[str, Array]


def take(
    p: Programs, states: States, prompts: PromptBatch, index: int
) -> tuple[States, Metrics]:
  """The states after step number `index`, and its metrics."""
  rollout = respond(p, states, prompts, index)
  return learn(p, states, prompts, rollout, index)


def respond(
    p: Programs, states: States, prompts: PromptBatch, index: int
) -> Rollout:
  """Samples a response to each prompt from the policy."""
  with jax.profiler.TraceAnnotation('rollout'):
    policy = p.to_decode(p.models(states).policy)
    return p.rollout(policy, prompts, p.spec.key('rollout'), index)


def learn(
    p: Programs,
    states: States,
    prompts: PromptBatch,
    rollout: Rollout,
    index: int,
) -> tuple[States, Metrics]:
  """Updates critic and policy; the critic alone while it warms up.

  With one update a rollout, one program scores, forms the experience and learns
  in the same forward pass (`fused`); else these are programs of their own.
  """
  trained, fused = p.trained(index), p.fused(index)
  keys_B, kl_coef = p.macro_keys(prompts, index), states['kl_coef']
  if fused:
    host = p.ask_host(prompts, rollout)
    with jax.profiler.TraceAnnotation('one_pass'):
      new, experience, metrics, learned = p.score_and_learn(
          states, rollout, keys_B, kl_coef, host.answers
      )
  else:
    with jax.profiler.TraceAnnotation('score'):
      scored = p.score(states, rollout)
    host = p.ask_host(prompts, rollout)  # while the devices score
    experience, metrics = p.experience(
        rollout, scored, keys_B, kl_coef, host.answers
    )
    new, learned = {}, {}
  with jax.profiler.TraceAnnotation('update'):
    for name in trained:
      if name not in fused:
        new[name], learned[name] = p.update(name, states, experience, index)
  if 'policy' in trained:  # else the KL says nothing of its coefficient
    new |= p.adapt_kl(states, metrics)
  metrics |= host.metrics | p.describe_updates(learned, new)
  return states | new, metrics


def form_experience(
    sequences: SequenceBatch,
    scored: Scored,
    keys_B: Array,
    kl_coef: Array,
    host: HostAnswers,
    method: Method,
) -> tuple[Experience, Array]:
  """Macro actions, token rewards [B, T], and what policy and critic aim at.

  Args:
    sequences: prompts and responses.
    scored: what the models said about them before the update.
    keys_B: a random key for each row, for random lengths of macro actions.
    kl_coef: scalar, reward-model units per nat.
    host: what it said about the text.
    method: of the run.
  """
  objective, mask_BT = method.objective, sequences.response_mask_BT
  with jax.named_scope('macro'):
    macro = segment(mask_BT, scored, keys_B, host, method.rule)
    scored = scored.replace(score_B=total_score(scored, host))
    # Every token pays for its KL, the last one earns the score.
    rewards_BT = rewards.token_rewards(
        scored.logprobs_BT,
        scored.ref_logprobs_BT,
        scored.score_B,
        mask_BT,
        kl_coef=kl_coef,
        score_clip=objective.score_clip,
    )
    # Pooled over macro actions, estimated, and spread over their tokens.
    aims = targets.estimate(scored.values_BT, rewards_BT, macro, objective)
  return Experience(sequences, scored, macro, aims), rewards_BT
