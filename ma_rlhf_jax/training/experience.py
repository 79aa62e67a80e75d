"""Rollouts -> what the PPO update reads, in one jitted program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import aggregate, termination
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.objective import advantage, losses, rewards
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    MacroActions,
    Params,
    Rollout,
    Scored,
    SequenceBatch,
    Targets,
)


class Models(NamedTuple):
  """One thing for each of the models of PPO: shapes, or parameters."""

  policy: Any
  ref_policy: Any
  critic: Any
  reward_model: Any


def termination_settings(
    macro: ConfigDict,
) -> termination.TerminationSettings:
  """The `macro` block of a config, as the rules read it."""
  return termination.TerminationSettings(
      termination=macro.termination,
      ngram=macro.ngram,
      random_lengths=tuple(macro.random_lengths),
      random_repeats=macro.random_repeats,
  )


def score_sequences(
    shapes: Models,
    params: Models,
    sequences: SequenceBatch,
    *,
    temperature: float,
    chunk_tokens: int,
    num_micro: int,
) -> Scored:
  """What the four models say about finished responses.

  Args:
    shapes: `GemmaConfig` of each model.
    params: parameters of each model.
    sequences: prompts and responses.
    temperature: of the log-probs.
    chunk_tokens: tokens whose logits exist at once.
    num_micro: micro-batches, one after the other.
  """

  def logprobs(
      shape: GemmaConfig, params: Params, rows: SequenceBatch, entropy: bool
  ) -> tuple[Array, Array]:
    return scoring.response_logprobs(
        shape,
        params,
        rows,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        with_entropy=entropy,
    )

  def score(rows: SequenceBatch) -> Scored:
    new_BT, entropy_BT = logprobs(shapes.policy, params.policy, rows, True)
    ref_BT, _ = logprobs(shapes.ref_policy, params.ref_policy, rows, False)
    return Scored(
        logprobs_BT=new_BT,
        ref_logprobs_BT=ref_BT,
        entropy_BT=entropy_BT,
        values_BT=scoring.response_values(shapes.critic, params.critic, rows),
        score_B=scoring.sequence_scores(
            shapes.reward_model, params.reward_model, rows
        ),
    )

  with jax.named_scope('score'):
    return scoring.in_micro_batches(score, sequences, num_micro)


def make_targets(
    scored: Scored, macro: MacroActions, config: ConfigDict
) -> tuple[Targets, Array]:
  """Advantages and returns, and the token rewards [B, T] they come from."""
  p, m = config.ppo, config.macro
  rewards_BT = rewards.token_rewards(
      scored.logprobs_BT,
      scored.ref_logprobs_BT,
      scored.score_B,
      macro.mask_BT,
      kl_coef=p.kl_coef,
      score_clip=p.score_clip,
  )
  targets = advantage.macro_targets(
      scored.values_BT,
      rewards_BT,
      macro,
      gamma=p.gamma,
      gae_lambda=p.gae_lambda,
      reward=m.reward,
      value=m.value,
      critic_target=config.critic.target,
  )
  if p.whiten_advantages:
    white_BT = masking.masked_whiten(targets.advantages_BT, macro.mask_BT)
    targets = targets.replace(advantages_BT=white_BT)
  return targets, rewards_BT


def make_experience(
    params: Models,
    rollout: Rollout,
    macro_keys_B: Array,
    *,
    shapes: Models,
    config: ConfigDict,
    temperature: float,
    num_micro: int,
) -> tuple[Experience, dict[str, Array]]:
  """Scores rollouts, forms macro actions, and estimates advantages.

  Args:
    params: of the four models.
    rollout: prompts with sampled responses.
    macro_keys_B: one random key a row, for random macro lengths.
    shapes: of the four models.
    config: the whole config; read while tracing only.
    temperature: of the log-probs in ratio, KL and perplexity.
    num_micro: micro-batches of the scoring passes.

  Returns:
    The experience, and metrics of it.
  """
  sequences = rollout.sequences
  scored = score_sequences(
      shapes,
      params,
      sequences,
      temperature=temperature,
      chunk_tokens=config.model.logprob_chunk,
      num_micro=num_micro,
  )
  with jax.named_scope('macro'):
    macro = termination.segment(
        termination.TerminationInputs(
            mask_BT=sequences.response_mask_BT,
            ref_logprobs_BT=scored.ref_logprobs_BT,
            keys_B=macro_keys_B,
        ),
        termination_settings(config.macro),
    )
    targets, rewards_BT = make_targets(scored, macro, config)
  experience = Experience(
      sequences=sequences, scored=scored, macro=macro, targets=targets
  )
  metrics = experience_metrics(experience, rewards_BT)
  metrics |= scoring.sampler_statistics(
      rollout.sample_logprobs_BT,
      rollout.kept_mass_BT,
      scored.logprobs_BT,
      macro.mask_BT,
  )
  return experience, metrics


def experience_metrics(
    experience: Experience, rewards_BT: Array
) -> dict[str, Array]:
  """Scalars that describe a batch of rollouts; means are over real tokens.

  Args:
    experience: the batch.
    rewards_BT: token rewards, reward-model units.
  """
  scored, targets = experience.scored, experience.targets
  mask_BT = experience.macro.mask_BT
  kl_B, kl_k3 = rewards.kl_estimates(
      scored.logprobs_BT, scored.ref_logprobs_BT, mask_BT
  )
  reward_B = masking.masked_sum(rewards_BT, mask_BT, axis=1)
  mean = lambda x_BT: masking.masked_mean(x_BT, mask_BT)
  dtype = masking.wide(scored.score_B.dtype)
  length_B = jnp.sum(mask_BT, axis=1, dtype=dtype)
  macro = aggregate.statistics(experience.macro)
  return {
      'objective/kl': jnp.mean(kl_B),
      'objective/kl_k3': kl_k3,
      'objective/entropy': mean(scored.entropy_BT),
      'objective/score': jnp.mean(scored.score_B),
      'objective/score_std': jnp.std(scored.score_B),
      'objective/rlhf_reward': jnp.mean(reward_B),
      'response/length': jnp.mean(length_B),
      'response/length_max': jnp.max(length_B),
      'critic/value': mean(scored.values_BT),
      'critic/return': mean(targets.returns_BT),
      'critic/explained_variance': losses.explained_variance(
          scored.values_BT, targets.returns_BT, mask_BT
      ),
      'policy/advantage_std': jnp.sqrt(
          mean(jnp.square(targets.advantages_BT - mean(targets.advantages_BT)))
      ),
      **{f'macro/{name}': value for name, value in macro.items()},
      'tokens': jnp.sum(experience.sequences.mask_BL, dtype=jnp.int32),
  }
