"""Scoring and learning in one forward pass, where that is exact.

With one update a rollout, the policy that scores is the policy that learns: the
old log-probs and values are the new ones, held fixed. So the pass that takes
the gradient can score too, and nothing is computed twice.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from ml_collections import ConfigDict
import optax

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.models import lora
from ma_rlhf_jax.objective import losses
from ma_rlhf_jax.objective import targets as targets_lib
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    MacroActions,
    Rollout,
    SequenceBatch,
    TrainState,
)
from ma_rlhf_jax.training import buckets, ppo_update, update
from ma_rlhf_jax.training.experience import (
    Models,
    describe,
    form_macro_actions,
    make_targets,
    score_rows,
)

Metrics = dict[str, Array]


def why_not(config: ConfigDict) -> str:
  """Why one pass would not be exact; '' = it is.

  A row must not depend on others, nor what it counts in the loss on the pass.
  """
  c = config.ppo
  asks = config.macro.termination in termination.BY_PROBABILITY
  reasons = {
      f'ppo.one_pass={c.one_pass}': c.one_pass == 'off',
      f'ppo.ppo_epochs={c.ppo_epochs}': c.ppo_epochs > 1,
      f'ppo.minibatches={c.minibatches}': c.minibatches > 1,
      'ppo.whiten_advantages': c.whiten_advantages,
      f'ppo.baseline={c.baseline}': c.baseline != 'critic',
      f'ppo.loss_reduction=macro with macro.termination='
      f'{config.macro.termination}': asks
      and c.loss_reduction == 'macro',
      f'critic.target=starts with macro.termination='
      f'{config.macro.termination}': asks
      and config.critic.target == 'starts',
  }
  return ', '.join(reason for reason, holds in reasons.items() if holds)


def _forward(
    learning: dict[str, Any],
    rows: dict[str, Any],
    *,
    width: int | None,
    shapes: Models,
    params: Callable[[dict[str, Any]], Models],
    kl_coef: Array,
    config: ConfigDict,
    how: dict[str, Any],
) -> tuple[Array, tuple[Metrics, tuple[Experience, Array]]]:
  """The losses of what learns, summed; metrics; experience and rewards."""
  sequences: SequenceBatch = rows['sequences']
  new = score_rows(shapes, params(learning), sequences, width=width, **how)
  old = jax.lax.stop_gradient(new)
  macro: MacroActions | None = rows['macro']
  if macro is None:
    keys_B = jax.random.wrap_key_data(rows['key_data_B2'])
    macro = form_macro_actions(
        sequences.response_mask_BT, old, keys_B, None, config.macro
    )
  targets, rewards_BT = make_targets(old, macro, config, kl_coef)
  experience = Experience(sequences, old, macro, targets)
  policy_loss, policy = losses.policy_loss(
      new.logprobs_BT,
      old.logprobs_BT,
      targets.advantages_BT,
      rows['policy_weights'],
      macro,
      clip_eps=config.ppo.clip_eps,
      ratio=config.ppo.ratio,
  )
  metrics = {'policy': {'loss': policy_loss, **policy}}
  if 'critic' in learning:
    value_loss, critic = losses.value_loss(
        new.values_BT,
        old.values_BT,
        targets.returns_BT,
        rows['critic_weights'],
        targets_lib.critic_mask(macro, critic_target=config.critic.target),
        clip_eps=config.critic.clip_eps,
    )
    metrics['critic'] = {'loss': value_loss, **critic}
  # The parameters of the two models are disjoint: so are the gradients.
  loss = sum(found['loss'] for found in metrics.values())
  return loss, (metrics, (experience, rewards_BT))


def step(
    states: dict[str, TrainState],
    frozen: dict[str, Any],
    fixed: Models,
    rollout: Rollout,
    macro_keys_B: Array,
    kl_coef: Array,
    given_BT: Array | None,
    *,
    shapes: Models,
    config: ConfigDict,
    optimizers: dict[str, optax.GradientTransformation],
    split: buckets.Buckets,
    temperature: float,
    chunk_tokens: int,
) -> tuple[dict[str, TrainState], Experience, Metrics, dict[str, Metrics]]:
  """One update of each state, the scores it rests on taken in the same pass.

  Args:
    states: of the models that learn: `policy`, and perhaps `critic`.
    frozen: what does not learn of policy and critic, see `models.lora`.
    fixed: parameters of the models that do not learn: the reference, the
      reward model, and a critic that has no state here.
    rollout: prompts with sampled responses.
    macro_keys_B: one random key a row, for random macro lengths.
    kl_coef: scalar, reward-model units per nat.
    given_BT: bool, where a rule of the host opens macro actions, or None.
    shapes: of the four models.
    config: the whole config; read while tracing only.
    optimizers: of the states.
    split: the micro-batches.
    temperature: of the log-probs.
    chunk_tokens: tokens whose logits exist at once.

  Returns:
    The new states, the experience, its metrics, and those of each update.
  """
  sequences, macro = rollout.sequences, None
  mask_BT = sequences.response_mask_BT
  counted = MacroActions(ids_BT=mask_BT, starts_BT=mask_BT, mask_BT=mask_BT)
  if config.macro.termination not in termination.BY_PROBABILITY:
    macro = counted = form_macro_actions(
        mask_BT, None, macro_keys_B, given_BT, config.macro
    )
  rows: dict[str, Any] = {
      'sequences': sequences,
      # As numbers, which can be filled up.
      'key_data_B2': jax.random.key_data(macro_keys_B),
      'macro': macro,
      'policy_weights': ppo_update.policy_weights(counted, config),
      'critic_weights': ppo_update.critic_weights(counted, config),
  }

  def params(learning: dict[str, Any]) -> Models:
    trained = {n: lora.join(frozen[n], x) for n, x in learning.items()}
    return partition.on_device(fixed)._replace(**trained)

  learning = {name: state.params for name, state in states.items()}

  def one(rows: Any, width: int | None) -> tuple[Any, Any]:
    loss_fn = functools.partial(
        _forward,
        rows=rows,
        width=width,
        shapes=shapes,
        params=params,
        kl_coef=kl_coef,
        config=config,
        how={'temperature': temperature, 'chunk_tokens': chunk_tokens},
    )
    grads, (metrics, made) = jax.grad(loss_fn, has_aux=True)(learning)
    grads = {n: partition.constrain_params(x) for n, x in grads.items()}
    return (grads, metrics), made

  with jax.named_scope('update'):
    (grads, learned), (experience, rewards_BT) = buckets.run(
        split, one, rows, masking.lengths(sequences.mask_BL)
    )
    states = dict(states)
    for name in states:
      states[name], norms = update.apply_gradients(
          states[name], grads[name], optimizers[name]
      )
      learned[name] |= norms
  metrics = describe(rollout, experience, rewards_BT, kl_coef, config)
  return states, experience, metrics, learned
