"""Advantages and returns, over tokens or over macro actions.

Two discounts, both 1 by default (t is a token, m a macro action):

  discount   token t -> t + 1              macro action m -> m + 1
  macro      gamma where t ends m, else 1  gamma
  token      gamma                         gamma ** length of m
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Self

import chex
from jax import lax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import aggregate, authors
from ma_rlhf_jax.structs import Array, MacroActions


def _field(name: str) -> Any:
  return dataclasses.field(metadata={'config': name})


@dataclasses.dataclass(frozen=True)
class Objective:
  """The settings of rewards, estimation and losses; hashable.

  `stage_fields` says what most are, with unit and source. A setting of a new
  estimator is a line there and a line here.

  Example:
    paper = Objective.from_config(config.base())
    undiscounted = dataclasses.replace(paper, gamma=1.0, gae_lambda=1.0)
  """

  gamma: float = _field('ppo.gamma')
  gae_lambda: float = _field('ppo.gae_lambda')
  critic_lambda: float = _field('critic.gae_lambda')  # < 0: gae_lambda
  discount: str = _field('ppo.discount')
  pool_rewards: str = _field('macro.reward')
  pool_values: str = _field('macro.value')
  advantage: str = _field('ppo.advantage')
  critic_target: str = _field('critic.target')
  baseline: str = _field('ppo.baseline')
  samples_per_prompt: int = _field('ppo.samples_per_prompt')
  whiten_advantages: bool = _field('ppo.whiten_advantages')
  score_clip: float = _field('ppo.score_clip')
  ratio: str = _field('ppo.ratio')
  loss_reduction: str = _field('ppo.loss_reduction')
  clip_eps: float = _field('ppo.clip_eps')
  value_clip_eps: float = _field('critic.clip_eps')

  @classmethod
  def from_config(cls, config: ConfigDict) -> Self:
    """The settings that a whole config holds."""
    values = {}
    for field in dataclasses.fields(cls):
      block, name = field.metadata['config'].split('.')
      values[field.name] = config[block][name]
    return cls(**values)

  @property
  def of_critic(self) -> Self:
    """The same with the critic's lambda as `gae_lambda`."""
    own = self.critic_lambda >= 0
    gae_lambda = self.critic_lambda if own else self.gae_lambda
    return dataclasses.replace(self, gae_lambda=gae_lambda)


def _backward(gains_BT: Array, decay_BT: Array) -> Array:
  """`y_t = gains_t + decay_t y_{t+1}`, 0 past the last column."""

  def step(later_B: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
    gain_B, decay_B = x
    sum_B = gain_B + decay_B * later_B
    return sum_B, sum_B

  start_B = jnp.zeros_like(gains_BT[:, 0])
  inputs = gains_BT.T, decay_BT.T.astype(gains_BT.dtype)
  _, sums_TB = lax.scan(step, start_B, inputs, reverse=True)
  return sums_TB.T


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

  advantages_BM = _backward(deltas_BM, gamma_BM * trace_BM)
  advantages_BM = jnp.where(mask_BM, advantages_BM, 0)
  return advantages_BM, advantages_BM + values_BM


def piecewise(macro: MacroActions, value: float) -> Array:
  """float [B, T]: `value` at the end of each macro action, else 1.

  As the per-token lambda of `gae` it makes token steps see what macro steps
  see: credit passes undiminished through a macro action.
  """
  return jnp.where(aggregate.ends(macro), value, 1.0)


def _discount_per_macro(macro: MacroActions, gamma: float) -> Array:
  """[B, T]: gamma where a macro action ends, 1 inside."""
  return piecewise(macro, gamma)


def _discount_per_token(macro: MacroActions, gamma: float) -> Array:
  """[B, T]: gamma everywhere."""
  return jnp.full(macro.mask_BT.shape, gamma, jnp.result_type(float))


# Name of config.ppo.discount -> [B, T], the discount from token t to t + 1.
DISCOUNTS: dict[str, Callable[[MacroActions, float], Array]] = {
    'macro': _discount_per_macro,  # authors; gamma per decision
    'token': _discount_per_token,  # SMDP: gamma per step of the environment
}


def _inside(macro: MacroActions, gamma: float, discount: str) -> Array:
  """[B, T]: discount from the first token of the macro action to token t."""
  offset_BT, _ = aggregate.places(macro)
  base = gamma if discount == 'token' else 1.0
  return jnp.asarray(base, jnp.result_type(float)) ** offset_BT


def macro_gae(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    objective: Objective,
) -> tuple[Array, Array]:
  """Advantages and returns of macro actions, float [B, M]; see `gae`.

  R_m = pool(rewards), V_m = pool(values). Under the discount per token the k-th
  reward of a macro action is worth gamma ** k, and what follows it gamma **
  length, as in a semi-Markov decision process; the trace is gae_lambda a macro
  action either way. An empty step of `macro.empty_B` has R = V = 0.

  Args:
    values_BT: float, reward-model units; anything on padding.
    rewards_BT: float, reward-model units; anything on padding.
    macro: the macro actions.
    objective: of which are read
      `gamma`: discount per macro action or per token;
      `gae_lambda`: trace per macro action, whatever its length;
      `discount`: a key of `DISCOUNTS`;
      `pool_rewards`: `sum` (paper), `mean` (authors) or another of
      `aggregate.WEIGHTS`;
      `pool_values`: `start` (SMDP: the value of the state in which the macro
      action is chosen), `equal` (paper), `unit`, `position` or
      `position_reversed`.

  Source: arXiv 2410.02743, section 3. The authors' code averages the rewards.
  """
  chex.assert_equal_shape([values_BT, rewards_BT, macro.mask_BT])
  o = objective
  pool = lambda x_BT, name: aggregate.pool(x_BT, macro, weights=name)
  inside_BT = _inside(macro, o.gamma, o.discount)
  rewards_BM = pool(rewards_BT * inside_BT, o.pool_rewards)
  values_BM = pool(values_BT, o.pool_values)
  mask_BM = aggregate.macro_mask(macro)
  decay_BM = jnp.full(mask_BM.shape, o.gamma, jnp.result_type(float))
  if o.discount == 'token':
    decay_BM = decay_BM ** aggregate.lengths(macro)
  if macro.empty_B is None:
    return gae(
        values_BM, rewards_BM, mask_BM, gamma=decay_BM, gae_lambda=o.gae_lambda
    )
  insert = lambda x_BM: authors.insert_empty_steps(x_BM, macro.empty_B)
  advantages_BS, returns_BS = gae(
      insert(values_BM),
      insert(rewards_BM),
      ~insert(~mask_BM),  # the empty step counts
      gamma=o.gamma,
      gae_lambda=o.gae_lambda,
  )
  remove = lambda x_BS: authors.remove_empty_steps(x_BS, macro.empty_B)
  return remove(advantages_BS), remove(returns_BS)


def rewards_to_go(
    rewards_BT: Array, macro: MacroActions, objective: Objective
) -> Array:
  """What each macro action and all after it have earned, float [B, M].

  G_m = R_m + gamma_m G_{m+1}

  with the rewards and discounts of `macro_gae`, but no value and no lambda in
  it: the sample of what the critic estimates. 0 past the last macro action.
  """
  _, returns_BM = macro_gae(
      jnp.zeros_like(rewards_BT),
      rewards_BT,
      macro,
      dataclasses.replace(objective, gae_lambda=1.0, pool_values='start'),
  )
  return returns_BM


def own_advantages(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    objective: Objective,
) -> Array:
  """Each token's own advantage, float [B, T]; arguments as in `macro_gae`.

  Of the macro action's advantage, what token k cannot change is left out: the
  rewards before it, and the values up to its own state, for which its own
  value stands in,

    own_k = advantage_m - sum_{i<k} r_i + sum_{i<=k} sigma_i V_i
            - (sigma_0 + ... + sigma_k) V_k

  so that the expected gradient stays and variance goes. At the first token it
  is advantage_m. With `start` and `sum` it is token GAE with lambda = 1 inside
  macro actions and gae_lambda at their ends; under the discount per token it
  needs `start`.
  """
  chex.assert_equal_shape([values_BT, rewards_BT, macro.mask_BT])
  dtype = masking.wide(jnp.result_type(values_BT, rewards_BT))
  clean = lambda x_BT: jnp.where(macro.mask_BT, x_BT, 0).astype(dtype)
  values_BT, rewards_BT = clean(values_BT), clean(rewards_BT)
  o = objective
  sigma_BT = aggregate.sigma(macro, o.pool_values, dtype)
  rho_BT = aggregate.sigma(macro, o.pool_rewards, dtype)
  values_BM = aggregate.pool(values_BT, macro, weights=o.pool_values)
  next_BM = jnp.pad(values_BM[:, 1:], ((0, 0), (0, 1)))
  gamma_BT = DISCOUNTS[o.discount](macro, o.gamma)
  ends_BT = aggregate.ends(macro)
  bootstrap_BT = jnp.where(ends_BT, aggregate.spread(next_BM, macro), 0)
  gains_BT = (
      rho_BT * rewards_BT - sigma_BT * values_BT + gamma_BT * bootstrap_BT
  )
  decay_BT = gamma_BT * piecewise(macro, o.gae_lambda)
  # Nothing is left to subtract before the first token of a macro action.
  before_BT = _before(sigma_BT, macro)
  return clean(_backward(gains_BT, clean(decay_BT)) - before_BT * values_BT)


def _before(x_BT: Array, macro: MacroActions) -> Array:
  """[B, T]: sum of `x` over the earlier tokens of the same macro action."""
  earlier_BT = jnp.cumsum(x_BT, axis=1) - x_BT
  at_start_BM = aggregate.pool(earlier_BT, macro, weights='start')
  return earlier_BT - aggregate.spread(at_start_BM, macro)


# (values_BT, rewards_BT, macro, objective) -> [B, T], one number a token.
Estimator = Callable[[Array, Array, MacroActions, Objective], Array]


def _token_returns(
    values_BT: Array,
    rewards_BT: Array,
    macro: MacroActions,
    objective: Objective,
) -> Array:
  """Each token's own lambda-return under the piecewise lambda."""
  o = objective
  _, returns_BT = gae(
      values_BT,
      rewards_BT,
      macro.mask_BT,
      gamma=DISCOUNTS[o.discount](macro, o.gamma),
      gae_lambda=piecewise(macro, o.gae_lambda),
  )
  return returns_BT


def _shared_returns(*args: Array | MacroActions | Objective) -> Array:
  """The macro action's return at each of its tokens."""
  _, returns_BM = macro_gae(*args)
  return aggregate.spread(returns_BM, args[2])


def _shared_advantages(*args: Array | MacroActions | Objective) -> Array:
  """The macro action's advantage at each of its tokens."""
  advantages_BM, _ = macro_gae(*args)
  return aggregate.spread(advantages_BM, args[2])


# Name of config.ppo.advantage -> the advantages of the policy's tokens. A
# function of the user's own, `module:function`, has the same form.
ADVANTAGES: dict[str, Estimator] = {
    'shared': _shared_advantages,  # paper
    'own': own_advantages,
}
# Name of config.critic.target -> what the critic regresses to.
CRITIC_TARGETS: dict[str, Estimator] = {
    'token': _token_returns,
    'macro': _shared_returns,  # paper
    'starts': _shared_returns,  # counted at `critic_mask` only
}
