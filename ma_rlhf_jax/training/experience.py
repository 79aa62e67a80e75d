"""Rollouts -> scores -> what the PPO update reads, in two jitted programs.

Between the two, the host may say where macro actions start.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import aggregate, termination
from ma_rlhf_jax.objective import advantage, losses, rewards
from ma_rlhf_jax.objective import targets as targets_lib
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    MacroActions,
    Rollout,
    Scored,
    SequenceBatch,
    Targets,
)
from ma_rlhf_jax.training import buckets


class Models(NamedTuple):
  """One thing for each of the models of PPO: shapes, or parameters.

  Without a critic (`ppo.baseline=rloo`) its entry is None.
  """

  policy: Any
  ref_policy: Any
  critic: Any
  reward_model: Any


def termination_settings(
    macro: ConfigDict,
) -> termination.TerminationSettings:
  """The `macro` block of a config, as the rules read it."""
  fields = dataclasses.fields(termination.TerminationSettings)
  values = {field.name: macro[field.name] for field in fields}
  values['random_lengths'] = tuple(values['random_lengths'])
  return termination.TerminationSettings(**values)


def score_sequences(
    shapes: Models,
    params: Models,
    sequences: SequenceBatch,
    *,
    temperature: float,
    chunk_tokens: int,
    split: buckets.Buckets,
) -> Scored:
  """What the four models say about finished responses.

  Args:
    shapes: `GemmaConfig` of each model.
    params: parameters of each model.
    sequences: prompts and responses.
    temperature: of the log-probs.
    chunk_tokens: tokens whose logits exist at once.
    split: the micro-batches, one after the other.
  """
  params = partition.on_device(params)
  how = {'temperature': temperature, 'chunk_tokens': chunk_tokens}

  def score(rows: SequenceBatch, width: int | None) -> tuple[tuple, Scored]:
    return (), score_rows(shapes, params, rows, width=width, **how)

  with jax.named_scope('score'):
    lengths_B = masking.lengths(sequences.mask_BL)
    return buckets.run(split, score, sequences, lengths_B)[1]


def score_rows(
    shapes: Models,
    params: Models,
    rows: SequenceBatch,
    *,
    temperature: float,
    chunk_tokens: int,
    width: int | None,
) -> Scored:
  """`score_sequences` of one micro-batch, no row longer than `width`."""
  logprobs = functools.partial(
      scoring.response_logprobs,
      temperature=temperature,
      chunk_tokens=chunk_tokens,
      width=width,
  )
  new_BT, entropy_BT = logprobs(
      shapes.policy, params.policy, rows, with_entropy=True
  )
  ref_BT, _ = logprobs(shapes.ref_policy, params.ref_policy, rows)
  values_BT = jnp.zeros_like(new_BT)
  if params.critic is not None:
    values_BT = scoring.response_values(
        shapes.critic, params.critic, rows, width
    )
  return Scored(
      logprobs_BT=new_BT,
      ref_logprobs_BT=ref_BT,
      entropy_BT=entropy_BT,
      values_BT=values_BT,
      score_B=scoring.sequence_scores(
          shapes.reward_model, params.reward_model, rows, width
      ),
  )


def _rewards_to_go(
    rewards_BT: Array, macro: MacroActions, config: ConfigDict
) -> Array:
  """[B, M]: rewards and discounts are those of the estimation."""
  return advantage.rewards_to_go(
      rewards_BT,
      macro,
      gamma=config.ppo.gamma,
      discount=config.ppo.discount,
      reward=config.macro.reward,
  )


def _baseline(
    rewards_BT: Array, macro: MacroActions, config: ConfigDict
) -> Array:
  """[B, T]: what the other responses to the prompt have earned in all."""
  returns_BM = _rewards_to_go(rewards_BT, macro, config)
  baseline_B = targets_lib.leave_one_out(
      returns_BM[:, 0], samples=config.ppo.samples_per_prompt
  )
  return jnp.where(macro.mask_BT, baseline_B[:, None], 0)


def make_targets(
    scored: Scored,
    macro: MacroActions,
    config: ConfigDict,
    kl_coef: float | Array | None = None,
) -> tuple[Targets, Array]:
  """Advantages and returns, and the token rewards [B, T] they come from.

  Args:
    scored: of the responses.
    macro: their macro actions.
    config: the whole config; read while tracing only.
    kl_coef: reward-model units per nat; None = `ppo.kl_coef`.
  """
  p, critic = config.ppo, config.critic
  rewards_BT = rewards.token_rewards(
      scored.logprobs_BT,
      scored.ref_logprobs_BT,
      scored.score_B,
      macro.mask_BT,
      kl_coef=p.kl_coef if kl_coef is None else kl_coef,
      score_clip=p.score_clip,
  )
  values_BT = scored.values_BT
  if p.baseline == 'rloo':
    values_BT = _baseline(rewards_BT, macro, config)
  targets = targets_lib.macro_targets(
      values_BT,
      rewards_BT,
      macro,
      gamma=p.gamma,
      gae_lambda=p.gae_lambda,
      critic_lambda=(
          p.gae_lambda if critic.gae_lambda < 0 else critic.gae_lambda
      ),
      discount=p.discount,
      reward=config.macro.reward,
      value=config.macro.value,
      advantage=p.advantage,
      critic_target=critic.target,
  )
  if p.whiten_advantages:
    white_BT = masking.masked_whiten(targets.advantages_BT, macro.mask_BT)
    targets = targets.replace(advantages_BT=white_BT)
  return targets, rewards_BT


def make_experience(
    rollout: Rollout,
    scored: Scored,
    macro_keys_B: Array,
    kl_coef: Array,
    given_BT: Array | None,
    *,
    config: ConfigDict,
) -> tuple[Experience, dict[str, Array]]:
  """Forms macro actions and estimates advantages.

  Args:
    rollout: prompts with sampled responses.
    scored: what the models say about them.
    macro_keys_B: one random key a row, for random macro lengths.
    kl_coef: scalar, reward-model units per nat.
    given_BT: bool, where a rule of the host opens macro actions, or None.
    config: the whole config; read while tracing only.

  Returns:
    The experience, and metrics of it.
  """
  macro = form_macro_actions(
      rollout.sequences.response_mask_BT,
      scored,
      macro_keys_B,
      given_BT,
      config.macro,
  )
  with jax.named_scope('macro'):
    targets, rewards_BT = make_targets(scored, macro, config, kl_coef)
  experience = Experience(
      sequences=rollout.sequences, scored=scored, macro=macro, targets=targets
  )
  return experience, describe(rollout, experience, rewards_BT, kl_coef, config)


def form_macro_actions(
    mask_BT: Array,
    scored: Scored | None,
    macro_keys_B: Array,
    given_BT: Array | None,
    config: ConfigDict,
) -> MacroActions:
  """The macro actions of responses under the rule of `config.macro`.

  Args:
    mask_BT: bool, response tokens.
    scored: of the responses; None where the rule asks no probabilities.
    macro_keys_B: one random key a row.
    given_BT: where a rule of the host opens macro actions, or None.
    config: `config.macro`.
  """
  logprobs_BT = jnp.zeros(mask_BT.shape)
  if scored is not None:
    logprobs_BT = {
        'ref': scored.ref_logprobs_BT,
        'old': scored.logprobs_BT,
    }[config.logprobs]
  with jax.named_scope('macro'):
    return termination.segment(
        termination.TerminationInputs(
            mask_BT=mask_BT,
            logprobs_BT=logprobs_BT,
            keys_B=macro_keys_B,
            given_BT=given_BT,
        ),
        termination_settings(config),
    )


def describe(
    rollout: Rollout,
    experience: Experience,
    rewards_BT: Array,
    kl_coef: Array,
    config: ConfigDict,
) -> dict[str, Array]:
  """All metrics of the rollouts of one step."""
  metrics = experience_metrics(experience, rewards_BT)
  if config.ppo.baseline == 'critic':
    metrics |= critic_metrics(experience, rewards_BT, config)
  metrics['objective/kl_coef'] = kl_coef
  return metrics | scoring.sampler_statistics(
      rollout.sample_logprobs_BT,
      rollout.kept_mass_BT,
      experience.scored.logprobs_BT,
      experience.macro.mask_BT,
  )


def critic_metrics(
    experience: Experience, rewards_BT: Array, config: ConfigDict
) -> dict[str, Array]:
  """Scalars about the critic before the update.

  `value` and `return`, what it says and what it is trained to say, are means
  over tokens. `explained_variance` and `bias` are over macro actions: the
  values V_m of the estimation against the discounted rewards-to-go G_m, which
  hold neither values nor lambda, so that runs with other lambdas, targets and
  macro actions can be compared.

  Args:
    experience: the batch.
    rewards_BT: token rewards, reward-model units.
    config: the whole config; read while tracing only.

  Returns:
    `explained_variance` has no unit, the others are reward-model units.
  """
  macro, values_BT = experience.macro, experience.scored.values_BT
  mean = lambda x_BT: masking.masked_mean(x_BT, macro.mask_BT)
  values_BM = aggregate.pool(values_BT, macro, weights=config.macro.value)
  to_go_BM = _rewards_to_go(rewards_BT, macro, config)
  mask_BM = aggregate.macro_mask(macro)
  return {
      'critic/value': mean(values_BT),
      'critic/return': mean(experience.targets.returns_BT),
      'critic/explained_variance': losses.explained_variance(
          values_BM, to_go_BM, mask_BM
      ),
      'critic/bias': masking.masked_mean(values_BM - to_go_BM, mask_BM),
  }


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
      'policy/advantage_std': jnp.sqrt(
          mean(jnp.square(targets.advantages_BT - mean(targets.advantages_BT)))
      ),
      **{f'macro/{name}': value for name, value in macro.items()},
      'tokens': jnp.sum(experience.sequences.mask_BL, dtype=jnp.int32),
  }
