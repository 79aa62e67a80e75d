"""What policy and critic aim at, made of token rewards and values."""

from collections.abc import Callable

import chex
import jax.numpy as jnp

from ma_rlhf_jax.macro import aggregate
from ma_rlhf_jax.objective import advantage as advantage_lib
from ma_rlhf_jax.structs import Array, MacroActions, Targets


def _token_returns(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    *,
    gamma: float,
    gae_lambda: float,
    discount: str,
    **pooling: str,
) -> Array:
  """Each token's own lambda-return under the piecewise lambda."""
  del pooling
  _, returns_BT = advantage_lib.gae(
      values_BT,
      rewards_BT,
      macro.mask_BT,
      gamma=advantage_lib.DISCOUNTS[discount](macro, gamma),
      gae_lambda=advantage_lib.piecewise(macro, gae_lambda),
  )
  return returns_BT


def _shared_returns(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    **estimation: float | str,
) -> Array:
  """The macro action's return at each of its tokens."""
  _, returns_BM = advantage_lib.macro_gae(
      values_BT, rewards_BT, macro, **estimation
  )
  return aggregate.spread(returns_BM, macro)


def _shared_advantages(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    **estimation: float | str,
) -> Array:
  """The macro action's advantage at each of its tokens."""
  advantages_BM, _ = advantage_lib.macro_gae(
      values_BT, rewards_BT, macro, **estimation
  )
  return aggregate.spread(advantages_BM, macro)


# Name of config.ppo.advantage -> what the policy's tokens are given.
ADVANTAGES: dict[str, Callable[..., Array]] = {
    'shared': _shared_advantages,  # paper
    'own': advantage_lib.own_advantages,
}
# Name of config.critic.target -> what the critic regresses to.
CRITIC_TARGETS: dict[str, Callable[..., Array]] = {
    'token': _token_returns,
    'macro': _shared_returns,  # paper
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
    gae_lambda: float,
    critic_lambda: float,
    advantage: str,
    critic_target: str,
    **estimation: float | str,
) -> Targets:
  """What policy and critic aim at. With one-token macro actions: token PPO.

  Args:
    values_BT: float, reward-model units; anything on padding.
    rewards_BT: float, reward-model units; anything on padding.
    macro: the macro actions.
    gae_lambda: trace per macro action of the advantages.
    critic_lambda: the same of the critic's returns.
    advantage: `shared` (paper): that of the macro action; `own`: see
      `own_advantages`.
    critic_target: `macro` (paper): the macro action's return at every token;
      `starts`: the same, for a critic loss over `critic_mask`; `token`: each
      token's own lambda-return from token rewards and token values, with
      critic_lambda at the last token of a macro action and 1 inside. The token
      rewards enter it undivided, whatever `reward` says.
    **estimation: `gamma`, `discount`, `reward` and `value` of `macro_gae`.

  Returns:
    float [B, T] advantages and returns; 0 on padding.
  """
  make = lambda function, trace: function(
      values_BT, rewards_BT, macro, gae_lambda=trace, **estimation
  )
  return Targets(
      advantages_BT=make(ADVANTAGES[advantage], gae_lambda),
      returns_BT=make(CRITIC_TARGETS[critic_target], critic_lambda),
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
