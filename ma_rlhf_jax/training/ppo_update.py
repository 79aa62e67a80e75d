"""The updates of policy and critic on an experience that has been scored."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from ma_rlhf_jax import masking
from ma_rlhf_jax.models import lora
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.objective import losses, targets
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    LossWeights,
    MacroActions,
    Params,
    TrainState,
)
from ma_rlhf_jax.training import buckets, update

Batch = tuple[Experience, LossWeights]


def policy_loss_fn(
    params: Params,
    batch: Batch,
    *,
    shape: GemmaConfig,
    clip_eps: float,
    ratio: str,
    temperature: float,
    chunk_tokens: int,
    width: int | None = None,
) -> tuple[Array, dict[str, Array]]:
  """The clipped surrogate on a (micro-)batch, and its metrics."""
  experience, weights = batch
  logprobs_BT, _ = scoring.response_logprobs(
      shape,
      params,
      experience.sequences,
      temperature=temperature,
      chunk_tokens=chunk_tokens,
      width=width,
  )
  return losses.policy_loss(
      logprobs_BT,
      experience.scored.logprobs_BT,
      experience.targets.advantages_BT,
      weights,
      experience.macro,
      clip_eps=clip_eps,
      ratio=ratio,
  )


def value_loss_fn(
    params: Params,
    batch: Batch,
    *,
    shape: GemmaConfig,
    config: ConfigDict,
    width: int | None = None,
) -> tuple[Array, dict[str, Array]]:
  """The critic's loss on a (micro-)batch, and its metrics."""
  experience, weights = batch
  return losses.value_loss(
      scoring.response_values(shape, params, experience.sequences, width),
      experience.scored.values_BT,
      experience.targets.returns_BT,
      weights,
      targets.critic_mask(experience.macro, critic_target=config.target),
      clip_eps=config.clip_eps,
  )


def update_on(
    state: TrainState,
    frozen: Params,
    experience: Experience,
    key: Array,
    *,
    loss_fn: update.LossFn,
    weigh: Callable[[Experience], LossWeights],
    optimizer: optax.GradientTransformation,
    ppo: ConfigDict,
    split: buckets.Buckets | None = None,
) -> tuple[TrainState, dict[str, Array]]:
  """`ppo_epochs` passes over the experience, in `minibatches` updates each.

  Args:
    state: of the policy or of the critic.
    frozen: the parameters of that model that do not learn, see `models.lora`.
    experience: all rows of the step.
    key: orders the rows of each pass; used only with several minibatches.
    loss_fn: takes (params, (experience, weights)), params being all of them.
    weigh: the weights of the tokens of one minibatch.
    optimizer: of this model.
    ppo: `config.ppo`.
    split: the micro-batches of one minibatch; None = all at full length,
      `ppo.micro_batch_size` of them together.

  Returns:
    The new state, and metrics averaged over the updates.
  """
  rows = experience.macro.ids_BT.shape[0]
  size = rows // ppo.minibatches
  micro_rows = ppo.micro_batch_size or size
  split = split or buckets.Buckets((0,), (micro_rows,))

  def joined(learning: Params, batch: Batch, width: int | None) -> Any:
    how = {} if width is None else {'width': width}
    return loss_fn(lora.join(frozen, learning), batch, **how)

  def one(state: TrainState, batch: Experience) -> tuple[TrainState, dict]:
    return update.train_step(
        state,
        (batch, weigh(batch)),
        loss_fn=joined,
        optimizer=optimizer,
        by_length=(split, masking.lengths(batch.sequences.mask_BL)),
    )

  if ppo.ppo_epochs * ppo.minibatches == 1:
    return one(state, experience)
  orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(
      jax.random.split(key, ppo.ppo_epochs)
  ).reshape(-1, size)
  take = lambda order: jax.tree.map(lambda x: x[order], experience)
  state, metrics = jax.lax.scan(
      lambda state, order: one(state, take(order)), state, orders
  )
  return state, jax.tree.map(jnp.mean, metrics)


def policy_weights(macro: MacroActions, config: ConfigDict) -> LossWeights:
  """The weights of response tokens in the loss of the policy."""
  return losses.loss_weights(
      macro.mask_BT, macro.starts_BT, reduction=config.ppo.loss_reduction
  )


def critic_weights(macro: MacroActions, config: ConfigDict) -> LossWeights:
  """The weights of response tokens in the loss of the critic."""
  return losses.loss_weights(
      targets.critic_mask(macro, critic_target=config.critic.target),
      macro.starts_BT,
      reduction=config.ppo.loss_reduction,
  )
