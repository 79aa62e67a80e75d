"""What a step logs about its rollouts and its critic."""

import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import aggregate
from ma_rlhf_jax.objective import advantage, losses, rewards, targets
from ma_rlhf_jax.objective.advantage import Objective
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import Array, Experience, Rollout


def describe(
    rollout: Rollout,
    experience: Experience,
    rewards_BT: Array,
    kl_coef: Array,
    objective: Objective,
) -> dict[str, Array]:
  """All metrics of the rollouts of one step."""
  metrics = experience_metrics(experience, rewards_BT)
  if targets.BASELINES[objective.baseline].has_critic:
    metrics |= critic_metrics(experience, rewards_BT, objective)
  metrics['objective/kl_coef'] = kl_coef
  return metrics | scoring.sampler_statistics(
      rollout.sample_logprobs_BT,
      rollout.kept_mass_BT,
      experience.scored.logprobs_BT,
      experience.macro.mask_BT,
  )


def critic_metrics(
    experience: Experience, rewards_BT: Array, objective: Objective
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
    objective: of the run.

  Returns:
    `explained_variance` has no unit, the others are reward-model units.
  """
  macro, values_BT = experience.macro, experience.scored.values_BT
  mean = lambda x_BT: masking.masked_mean(x_BT, macro.mask_BT)
  values_BM = aggregate.pool(values_BT, macro, weights=objective.pool_values)
  to_go_BM = advantage.rewards_to_go(rewards_BT, macro, objective)
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
  scored, aims = experience.scored, experience.targets
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
          mean(jnp.square(aims.advantages_BT - mean(aims.advantages_BT)))
      ),
      **{f'macro/{name}': value for name, value in macro.items()},
      'tokens': jnp.sum(experience.sequences.mask_BL, dtype=jnp.int32),
  }
