"""What policy and critic aim at, made of token rewards and values."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp

from ma_rlhf_jax import masking, registry
from ma_rlhf_jax.objective import advantage as advantage_lib
from ma_rlhf_jax.objective.advantage import (
    ADVANTAGES,
    CRITIC_TARGETS,
    Objective,
)
from ma_rlhf_jax.structs import Array, MacroActions, Targets


def _of_critic(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    objective: Objective,
) -> tuple[Array, Array]:
  """The critic's values."""
  del macro, objective
  return values_BT, rewards_BT


def _leave_one_out(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    objective: Objective,
) -> tuple[Array, Array]:
  """The mean return of the other responses to the prompt, at each token."""
  del values_BT
  returns_BM = advantage_lib.rewards_to_go(rewards_BT, macro, objective)
  baseline_B = leave_one_out(
      returns_BM[:, 0], samples=objective.samples_per_prompt
  )
  return jnp.where(macro.mask_BT, baseline_B[:, None], 0), rewards_BT


class Baseline(NamedTuple):
  """What is subtracted from the returns.

  Attributes:
    apply: (values_BT, rewards_BT, macro, objective) -> the values and the
      rewards that the advantages are estimated from.
    has_critic: whether a critic is trained for it.
    min_samples: responses to each prompt that it needs.
  """

  apply: Callable[..., tuple[Array, Array]]
  has_critic: bool = False
  min_samples: int = 1


# Name of config.ppo.baseline -> the baseline.
BASELINES: dict[str, Baseline] = {
    'critic': Baseline(_of_critic, has_critic=True),
    'rloo': Baseline(_leave_one_out, min_samples=2),
}


def critic_mask(
    mask_BT: Array, starts_BT: Array | None, critic_target: str
) -> Array:
  """bool [B, T]: tokens whose values the critic loss sees.

  Args:
    mask_BT: bool, real response tokens.
    starts_BT: bool, where macro actions start; `starts` alone needs them.
    critic_target: a key of `CRITIC_TARGETS`.
  """
  return starts_BT if critic_target == 'starts' else mask_BT


def estimate(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    objective: Objective,
) -> Targets:
  """Targets under the baseline of the objective, whitened where it says so.

  Args:
    values_BT: float, reward-model units, of the critic; anything on padding,
      and anywhere under a baseline that has no critic.
    rewards_BT: float, reward-model units; anything on padding.
    macro: the macro actions.
    objective: see `macro_targets`.
  """
  apply = BASELINES[objective.baseline].apply
  values_BT, rewards_BT = apply(values_BT, rewards_BT, macro, objective)
  targets = macro_targets(values_BT, rewards_BT, macro, objective)
  if objective.whiten_advantages:
    white_BT = masking.masked_whiten(targets.advantages_BT, macro.mask_BT)
    targets = targets.replace(advantages_BT=white_BT)
  return targets


def macro_targets(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    objective: Objective,
) -> Targets:
  """What policy and critic aim at. With one-token macro actions: token PPO.

  Args:
    values_BT: float, reward-model units; anything on padding.
    rewards_BT: float, reward-model units; anything on padding.
    macro: the macro actions.
    objective: of which are read, beside those of `macro_gae`,
      `critic_lambda`: trace of the critic's returns, < 0 for `gae_lambda`;
      `advantage`: `shared` (paper): that of the macro action; `own`: see
      `own_advantages`; or `module:function`;
      `critic_target`: `macro` (paper): the macro action's return at every
      token; `starts`: the same, for a critic loss over `critic_mask`; `token`:
      each token's own lambda-return from token rewards and token values, with
      the critic's lambda at the last token of a macro action and 1 inside. The
      token rewards enter it undivided, whatever `pool_rewards` says.

  Returns:
    float [B, T] advantages and returns; 0 on padding.
  """
  advantages = registry.resolve(
      ADVANTAGES, objective.advantage, 'ppo.advantage'
  )
  returns = CRITIC_TARGETS[objective.critic_target]
  advantages_BT = advantages(values_BT, rewards_BT, macro, objective)
  chex.assert_equal_shape([advantages_BT, macro.mask_BT])
  return Targets(
      advantages_BT=jnp.where(macro.mask_BT, advantages_BT, 0),
      returns_BT=returns(values_BT, rewards_BT, macro, objective.of_critic),
  )


def leave_one_out(returns_B: Array, *, samples: int) -> Array:
  """float [B]: mean return of the other samples of the same prompt.

  Args:
    returns_B: float, reward-model units; the samples of a prompt side by side.
    samples: of each prompt, >= 2.

  Source: RLOO, arXiv 2402.14740.
  """
  chex.assert_rank(returns_B, 1)
  if samples < 2 or returns_B.shape[0] % samples:
    raise ValueError(
        f'samples={samples} must be at least 2 and divide the '
        f'{returns_B.shape[0]} rows'
    )
  returns_NS = returns_B.reshape(-1, samples)
  others_NS = jnp.sum(returns_NS, axis=1, keepdims=True) - returns_NS
  return (others_NS / (samples - 1)).reshape(-1)
