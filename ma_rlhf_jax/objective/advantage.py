"""Generalised advantage estimation, over tokens or over macro actions."""

from collections.abc import Callable

import chex
from jax import lax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import aggregate
from ma_rlhf_jax.structs import Array, MacroActions, Targets


def gae(
    values_BM: Array,
    rewards_BM: Array,
    mask_BM: Array,
    *,
    gamma: float | Array,
    gae_lambda: float | Array,
) -> tuple[Array, Array]:
  """Advantages and returns of a sequence of steps.

  delta_t = r_t + gamma_t V_{t+1} - V_t
  advantage_t = delta_t + gamma_t lambda_t advantage_{t+1}
  return_t = advantage_t + V_t

  Nothing is bootstrapped past the last step: V and advantage are 0 there.

  Args:
    values_BM: float, reward-model units.
    rewards_BM: float, reward-model units.
    mask_BM: bool, true on the steps of a row, which stand side by side. What
      the other entries hold does not matter.
    gamma: discount from step t to t + 1, a scalar or [B, M].
    gae_lambda: trace from step t to t + 1, a scalar or [B, M].

  Returns:
    advantages and returns, float [B, M]; 0 where `mask_BM` is false.

  Source: arXiv 1506.02438; with macro actions arXiv 2410.02743.
  """
  chex.assert_rank(mask_BM, 2)
  chex.assert_type(mask_BM, bool)
  chex.assert_equal_shape([values_BM, rewards_BM, mask_BM])
  dtype = masking.wide(jnp.result_type(values_BM, rewards_BM))
  values_BM, rewards_BM, gamma_BM, trace_BM = (
      jnp.where(mask_BM, x, 0).astype(dtype)
      for x in (values_BM, rewards_BM, gamma, gae_lambda)
  )
  next_values_BM = jnp.pad(values_BM[:, 1:], ((0, 0), (0, 1)))
  deltas_BM = rewards_BM + gamma_BM * next_values_BM - values_BM

  def step(later_B: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
    delta_B, decay_B = x
    advantage_B = delta_B + decay_B * later_B
    return advantage_B, advantage_B

  _, advantages_MB = lax.scan(
      step,
      jnp.zeros_like(deltas_BM[:, 0]),
      (deltas_BM.T, (gamma_BM * trace_BM).T),
      reverse=True,
  )
  advantages_BM = jnp.where(mask_BM, advantages_MB.T, 0)
  return advantages_BM, advantages_BM + values_BM


def piecewise(macro: MacroActions, value: float) -> Array:
  """float [B, T]: `value` at the end of each macro action, else 1.

  As the per-token lambda of `gae` it makes token steps see what macro steps
  see: credit passes undiminished through a macro action.
  """
  return jnp.where(aggregate.ends(macro), value, 1.0)


def _token_returns(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    macro_returns_BM: Array,
    *,
    gamma: float,
    gae_lambda: float,
) -> Array:
  """Each token's own lambda-return under the piecewise lambda and gamma."""
  del macro_returns_BM
  _, returns_BT = gae(
      values_BT,
      rewards_BT,
      macro.mask_BT,
      gamma=piecewise(macro, gamma),
      gae_lambda=piecewise(macro, gae_lambda),
  )
  return returns_BT


def _shared_returns(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    macro_returns_BM: Array,
    *,
    gamma: float,
    gae_lambda: float,
) -> Array:
  """The macro action's return at each of its tokens."""
  del values_BT, rewards_BT, gamma, gae_lambda
  return aggregate.spread(macro_returns_BM, macro)


# Name of config.critic.target -> what the critic regresses to.
CRITIC_TARGETS: dict[str, Callable[..., Array]] = {
    'token': _token_returns,
    'macro': _shared_returns,
    'starts': _shared_returns,  # counted at `critic_mask` only
}


def critic_mask(macro: MacroActions, *, critic_target: str) -> Array:
  """bool [B, T]: tokens whose values the critic loss sees."""
  return macro.starts_BT if critic_target == 'starts' else macro.mask_BT


def macro_targets(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    *,
    gamma: float,
    gae_lambda: float,
    reward: str,
    value: str,
    critic_target: str,
) -> Targets:
  """Advantages shared within macro actions, and what the critic aims at.

  R_m = pool(rewards), V_m = pool(values); GAE over m = 0, 1, ...; token t of
  macro action m gets advantage_m. With one-token macro actions this is token
  PPO.

  Args:
    values_BT: float, reward-model units; anything on padding.
    rewards_BT: float, reward-model units; anything on padding.
    macro: the macro actions.
    gamma: discount per macro action, whatever its length.
    gae_lambda: trace per macro action, whatever its length.
    reward: `sum` (paper) or `mean` (authors).
    value: `start` (SMDP: the value of the state in which the macro action is
      chosen), `equal` (paper), `unit` or `position`.
    critic_target: `macro` (paper): return_m at every token; `starts`: the same,
      for a critic loss over `critic_mask`; `token`: each token's own
      lambda-return from token rewards and token values, with lambda and gamma
      at the last token of a macro action and 1 inside. The token rewards enter
      it undivided, whatever `reward` says.

  Returns:
    float [B, T] advantages and returns; 0 on padding.

  Source: arXiv 2410.02743, section 3. The authors' code averages the rewards.
  """
  chex.assert_equal_shape([values_BT, rewards_BT, macro.mask_BT])
  advantages_BM, returns_BM = gae(
      aggregate.pool(values_BT, macro, weights=value),
      aggregate.pool(rewards_BT, macro, weights=reward),
      aggregate.macro_mask(macro),
      gamma=gamma,
      gae_lambda=gae_lambda,
  )
  returns_BT = CRITIC_TARGETS[critic_target](
      values_BT,
      rewards_BT,
      macro,
      returns_BM,
      gamma=gamma,
      gae_lambda=gae_lambda,
  )
  return Targets(
      advantages_BT=aggregate.spread(advantages_BM, macro),
      returns_BT=returns_BT,
  )
