"""Scores, gradients and updates of a step, one micro-batch after the other.

Both ways to learn share one loss. Where the experience was formed before, the
loss compares new log-probs and values with stored ones. With one update a
rollout the two are equal, so one forward pass scores, forms the experience from
its own values, held fixed, and is differentiated.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from ma_rlhf_jax import masking
from ma_rlhf_jax.models import lora
from ma_rlhf_jax.objective import losses, targets
from ma_rlhf_jax.objective.advantage import Objective
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.ppo.host import HostAnswers
from ma_rlhf_jax.ppo.method import Method, segment
from ma_rlhf_jax.ppo.step import Metrics, form_experience
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    LossWeights,
    Models,
    Params,
    Rollout,
    Scored,
    SequenceBatch,
    TrainState,
)
from ma_rlhf_jax.training import buckets, update

# Of the names of what learns: its parameters -> those of the models.
Join = Callable[[dict[str, Params]], Models]


@struct.dataclass
class _Rows:
  """What the loss reads of each row.

  Attributes:
    sequences: prompts and responses.
    weights: of each token in the loss of each model that learns.
    experience: where it was formed before, else None.
    key_data_B2: random keys as numbers, which can be padded, and
    host: answers, to form it from.
  """

  sequences: SequenceBatch
  weights: dict[str, LossWeights]
  experience: Experience | None = None
  key_data_B2: Array | None = None
  host: HostAnswers | None = None


def score(
    params: Models,
    sequences: SequenceBatch,
    *,
    method: Method,
    split: buckets.Buckets,
) -> Scored:
  """What the four models say about finished responses."""
  params = partition.on_device(params)

  def one(rows: SequenceBatch, width: int | None) -> tuple[tuple, Scored]:
    return (), scoring.score_rows(
        method.configs,
        params,
        rows,
        temperature=method.temperature,
        width=width,
    )

  with jax.named_scope('score'):
    lengths_B = masking.lengths(sequences.mask_BL)
    return buckets.run(split, one, sequences, lengths_B)[1]


def token_weights(
    names: tuple[str, ...],
    mask_BT: Array,
    starts_BT: Array | None,
    objective: Objective,
) -> dict[str, LossWeights]:
  """What each token counts in the loss of each of these models.

  Args:
    names: `policy`, `critic` or both.
    mask_BT: bool, real response tokens of all rows of one update.
    starts_BT: bool, where macro actions start; None where that is not known
      before the models have scored, see `programs.why_not_fused`.
    objective: of the run.
  """
  weigh = functools.partial(
      losses.loss_weights,
      starts_BT=starts_BT,
      reduction=objective.loss_reduction,
  )
  made = {}
  if 'policy' in names:
    made['policy'] = weigh(mask_BT)
  if 'critic' in names:
    made['critic'] = weigh(
        targets.critic_mask(mask_BT, starts_BT, objective.critic_target)
    )
  return made


def model_losses(
    new: Scored,
    experience: Experience,
    weights: dict[str, LossWeights],
    objective: Objective,
) -> dict[str, Metrics]:
  """Loss and metrics of each model that has weights, summed over the rows.

  Args:
    new: log-probs and values under the parameters that learn.
    experience: the same of before the update, and the targets. In the first
      update of a rollout both are equal: then those of before are the new ones,
      held fixed.
    weights: of `loss_weights`.
    objective: of the run.
  """
  old, macro, aims = experience.scored, experience.macro, experience.targets
  found = {}
  if 'policy' in weights:
    loss, found['policy'] = losses.policy_loss(
        new.logprobs_BT,
        old.logprobs_BT,
        aims.advantages_BT,
        weights['policy'],
        macro,
        clip_eps=objective.clip_eps,
        ratio=objective.ratio,
    )
    found['policy']['loss'] = loss
  if 'critic' in weights:
    loss, found['critic'] = losses.value_loss(
        new.values_BT,
        old.values_BT,
        aims.returns_BT,
        weights['critic'],
        targets.critic_mask(
            macro.mask_BT, macro.starts_BT, objective.critic_target
        ),
        clip_eps=objective.value_clip_eps,
    )
    found['critic']['loss'] = loss
  return found


def _loss(
    learning: dict[str, Params],
    rows: _Rows,
    *,
    width: int | None,
    join: Join,
    kl_coef: Array | None,
    method: Method,
) -> tuple[Array, tuple[dict[str, Metrics], Any]]:
  """The losses of what learns, summed; metrics; what was formed on the way."""
  ask = functools.partial(
      scoring.score_rows,
      method.configs,
      join(learning),
      rows.sequences,
      temperature=method.temperature,
      width=width,
  )
  if rows.experience is not None:
    new, experience, formed = ask(only=tuple(learning)), rows.experience, ()
  else:
    new = ask()
    formed = experience, _ = form_experience(
        rows.sequences,
        jax.lax.stop_gradient(new),
        jax.random.wrap_key_data(rows.key_data_B2),
        kl_coef,
        rows.host,
        method,
    )
  found = model_losses(new, experience, rows.weights, method.objective)
  # The parameters of the two models are disjoint: so are the gradients.
  return sum(metrics['loss'] for metrics in found.values()), (found, formed)


def _learn(
    states: dict[str, TrainState],
    rows: _Rows,
    *,
    optimizers: dict[str, optax.GradientTransformation],
    split: buckets.Buckets,
    **how: Any,
) -> tuple[dict[str, TrainState], dict[str, Metrics], Any]:
  """One update of each state: new states, metrics, what `_loss` has formed."""
  learning = {name: state.params for name, state in states.items()}

  def one(rows: _Rows, width: int | None) -> tuple[Any, Any]:
    loss_fn = functools.partial(_loss, rows=rows, width=width, **how)
    grads, (metrics, formed) = jax.grad(loss_fn, has_aux=True)(learning)
    grads = {n: partition.constrain_params(x) for n, x in grads.items()}
    return (grads, metrics), formed

  with jax.named_scope('update'):
    lengths_B = masking.lengths(rows.sequences.mask_BL)
    (grads, learned), formed = buckets.run(split, one, rows, lengths_B)
    new = {}
    for name, state in states.items():
      new[name], norms = update.apply_gradients(
          state, grads[name], optimizers[name]
      )
      learned[name] |= norms
  return new, learned, formed


def score_and_learn(
    states: dict[str, TrainState],
    frozen: dict[str, Params],
    fixed: Models,
    rollout: Rollout,
    row_keys_B: Array,
    kl_coef: Array,
    host: HostAnswers,
    *,
    method: Method,
    optimizers: dict[str, optax.GradientTransformation],
    split: buckets.Buckets,
) -> tuple[dict[str, TrainState], dict[str, Metrics], tuple[Experience, Array]]:
  """One update of each state, scored in the pass that is differentiated.

  Args:
    states: of the models that learn: `policy`, and perhaps `critic`.
    frozen: what does not learn of policy and critic, see `models.lora`.
    fixed: parameters of the models that do not learn: the reference, the
      reward model, and a critic that has no state here.
    rollout: prompts with sampled responses.
    row_keys_B: one random key a row, for random macro lengths.
    kl_coef: scalar, reward-model units per nat.
    host: answers about the responses.
    method: of the run.
    optimizers: of the states.
    split: the micro-batches.

  Returns:
    The new states, the metrics of each update, and the experience with its
    token rewards.
  """
  sequences, starts_BT = rollout.sequences, None
  mask_BT = sequences.response_mask_BT
  if not method.rule.asks_models:
    macro = segment(mask_BT, None, row_keys_B, host, method.rule)
    starts_BT = macro.starts_BT
  rows = _Rows(
      sequences,
      token_weights(tuple(states), mask_BT, starts_BT, method.objective),
      key_data_B2=jax.random.key_data(row_keys_B),
      host=host,
  )

  def join(learning: dict[str, Params]) -> Models:
    trained = {n: lora.join(frozen[n], x) for n, x in learning.items()}
    return partition.on_device(fixed)._replace(**trained)

  return _learn(
      states,
      rows,
      optimizers=optimizers,
      split=split,
      join=join,
      kl_coef=kl_coef,
      method=method,
  )


def update_model(
    state: TrainState,
    frozen: Params,
    experience: Experience,
    key: Array,
    *,
    name: str,
    method: Method,
    optimizer: optax.GradientTransformation,
    epochs: int,
    minibatches: int,
    split: buckets.Buckets,
) -> tuple[TrainState, Metrics]:
  """`epochs` passes over an experience, in `minibatches` updates each.

  Args:
    state: of the policy or of the critic.
    frozen: the parameters of that model that do not learn, see `models.lora`.
    experience: all rows of the step.
    key: orders the rows of each pass; used only with several minibatches.
    name: of the model.
    method: of the run.
    optimizer: of the model.
    epochs: passes over all rows.
    minibatches: updates in a pass; divides the rows.
    split: the micro-batches of one minibatch.

  Returns:
    The new state, and metrics averaged over the updates.
  """

  def join(learning: dict[str, Params]) -> Models:
    params = {name: lora.join(frozen, learning[name])}
    return Models(**dict.fromkeys(Models._fields) | params)

  def one(state: TrainState, batch: Experience) -> tuple[TrainState, Metrics]:
    mask_BT, starts_BT = batch.macro.mask_BT, batch.macro.starts_BT
    weights = token_weights((name,), mask_BT, starts_BT, method.objective)
    states, learned, _ = _learn(
        {name: state},
        _Rows(batch.sequences, weights, experience=batch),
        optimizers={name: optimizer},
        split=split,
        join=join,
        kl_coef=None,
        method=method,
    )
    return states[name], learned[name]

  if epochs * minibatches == 1:
    return one(state, experience)
  rows = experience.macro.ids_BT.shape[0]
  orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(
      jax.random.split(key, epochs)
  ).reshape(-1, rows // minibatches)
  take = lambda order: jax.tree.map(lambda x: x[order], experience)
  state, metrics = jax.lax.scan(
      lambda state, order: one(state, take(order)), state, orders
  )
  return state, jax.tree.map(jnp.mean, metrics)
