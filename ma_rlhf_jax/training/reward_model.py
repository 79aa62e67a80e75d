"""Reward modelling on preference pairs."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ma_rlhf_jax import masking
from ma_rlhf_jax.config import LOSSES_ON_PADDING
from ma_rlhf_jax.data import batches
from ma_rlhf_jax.models import kernels, lora
from ma_rlhf_jax.models.heads import token_scores
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.objective import preference
from ma_rlhf_jax.parallel.mesh import gathered
from ma_rlhf_jax.structs import Array, PairBatch, Params, TrainState
from ma_rlhf_jax.training import checkpoint, console, optim, update
from ma_rlhf_jax.training.loop import Stage
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.spec import Program, Spec


def _rewards(
    shape: GemmaConfig, params: Params, pairs: PairBatch
) -> tuple[Array, Array]:
  """Token scores [B, L] of the chosen and of the rejected rows, in one pass."""
  both = jax.tree.map(
      lambda a, b: jnp.concatenate([a, b]), pairs.chosen, pairs.rejected
  )
  scores_2BL = token_scores(shape, params, both.tokens_BL, both.mask_BL)
  return tuple(jnp.split(scores_2BL, 2))


def _end_scores(
    params: Params, pairs: PairBatch, *, shape: GemmaConfig
) -> tuple[Array, Array]:
  """Scores [B] of the chosen and of the rejected rows."""
  chosen_BL, rejected_BL = _rewards(shape, params, pairs)
  return (
      masking.end_scores(chosen_BL, pairs.chosen.mask_BL),
      masking.end_scores(rejected_BL, pairs.rejected.mask_BL),
  )


def _step(
    state: TrainState,
    frozen: Params,
    pairs: PairBatch,
    *,
    shape: GemmaConfig,
    pair_loss: Callable[[Array, Array, PairBatch], Array],
    optimizer: optax.GradientTransformation,
    num_micro: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update; the loss is a mean over the pairs of the batch."""

  def loss_fn(params: Params, pairs: PairBatch) -> tuple[Array, dict]:
    params = lora.join(frozen, params)
    chosen_BL, rejected_BL = _rewards(shape, params, pairs)
    chosen_B = masking.end_scores(chosen_BL, pairs.chosen.mask_BL)
    rejected_B = masking.end_scores(rejected_BL, pairs.rejected.mask_BL)
    means = {
        'accuracy': preference.pair_accuracy(chosen_B, rejected_B),
        'chosen_score': jnp.mean(chosen_B),
        'rejected_score': jnp.mean(rejected_B),
    }
    loss = pair_loss(chosen_BL, rejected_BL, pairs)
    return loss / num_micro, jax.tree.map(lambda x: x / num_micro, means)

  state, metrics = update.train_step(
      state, pairs, loss_fn=loss_fn, optimizer=optimizer, num_micro=num_micro
  )
  renamed = {f'reward_model/{k}': v for k, v in metrics.items() if k != 'loss'}
  tokens = sum(
      jnp.sum(rows.mask_BL, dtype=jnp.int32)
      for rows in (pairs.chosen, pairs.rejected)
  )
  renamed |= {'loss/reward_model': metrics['loss'], 'tokens': tokens}
  return state, renamed


class Programs:
  """The programs of reward modelling; see `sft.Programs`.

  Attributes:
    frozen: parameters of the model that do not learn, see `models.lora`.
    abstract_states: shapes of what is trained.
    learning_rate: of an update, by its number.
    update: (state, frozen, pairs) -> new state and metrics.
    end_scores: (parameters, pairs) -> scores of both rows.
  """

  def __init__(
      self, spec: Spec, model: GemmaConfig, params: Params, num_steps: int
  ):
    c = spec.config.reward_model
    self._spec, self._model = spec, model
    self._optimizer = optim.make_optimizer(c.optim, num_steps)
    self.learning_rate = optim.learning_rate(c.optim, num_steps)
    self.frozen, _ = lora.split(model, params)
    self.abstract_states = self.init_states(checkpoint.abstract_of(params))
    on_padding = c.loss == LOSSES_ON_PADDING['reward_model.loss']
    self.update = jax.jit(
        functools.partial(
            _step,
            shape=kernels.plain(model) if on_padding else model,
            pair_loss=functools.partial(
                preference.pair_loss,
                loss=c.loss,
                pad_id=spec.pad_id,
                num_padding_at_beginning=c.num_padding_at_beginning,
            ),
            optimizer=self._optimizer,
            num_micro=update.num_micro(c.batch_size, c.micro_batch_size),
        ),
        donate_argnums=0,
    )
    self.end_scores = jax.jit(functools.partial(_end_scores, shape=model))

  def init_states(self, params: Params) -> dict[str, TrainState]:
    """What is trained, before the first update."""
    _, learning = lora.split(self._model, params)
    return {'reward_model': update.init_state(learning, self._optimizer)}

  def listing(self) -> dict[str, Program]:
    """What a step runs, by name."""
    size = self._spec.config.reward_model.batch_size
    rows = self._spec.abstract_sequences(size)
    state = self.abstract_states['reward_model']
    args = (state, checkpoint.abstract_of(self.frozen), PairBatch(rows, rows))
    return {'reward_model/update': Program(self.update, args)}


class RewardModel(Stage):
  """The second stage: a score that prefers chosen over rejected responses."""

  def __init__(self, run: Run, shape: GemmaConfig, params: Params):
    super().__init__(
        run, 'reward_model', run.config.reward_model, run.data.reward_model
    )
    self.shown = ('loss/reward_model', 'reward_model/accuracy')
    self.shape = shape
    self.programs = Programs(run.spec, shape, params, self.num_steps)
    self.states = self.programs.init_states(params)

  def step(self, states: dict, index: int) -> tuple[dict, dict[str, Any]]:
    batch = self.run.batch(batches.pair_batch, self.data, self.rows(index))
    p = self.programs
    state, metrics = p.update(states['reward_model'], p.frozen, batch)
    metrics['reward_model/lr'] = p.learning_rate(index)
    return {'reward_model': state}, metrics

  def params(self, states: dict) -> Params:
    """The parameters of the reward model."""
    return lora.join(self.programs.frozen, states['reward_model'].params)

  def held_out_scores(self, states: dict) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the chosen and of the rejected held-out responses."""
    params = self.params(states)
    found = [
        map(gathered, self.programs.end_scores(params, batch))
        for batch in self.run.held_out(batches.pair_batch, self.micro_size)
    ]
    join = lambda column: np.concatenate(column)[: len(self.run.data.eval)]
    chosen, rejected = (join(c) for c in zip(*found, strict=True))
    return chosen, rejected

  def evaluate(self, states: dict) -> dict[str, float]:
    self._scores = self.held_out_scores(states)
    chosen, rejected = self._scores
    margin = chosen - rejected
    return {
        'eval/accuracy': float(np.mean(margin > 0)),
        'eval/margin': float(np.mean(margin)),
        'eval/loss': float(np.mean(np.logaddexp(0, -margin))),
        'eval/score_mean': float(np.mean(np.r_[chosen, rejected])),
        'eval/score_std': float(np.std(np.r_[chosen, rejected])),
    }

  def samples(self, states: dict) -> str:
    del states  # those of the evaluation just before
    chosen, rejected = self._scores
    data = self.run.data.eval
    count = min(self.run.config.log.samples, len(data))
    texts = lambda ragged: [self.run.text(ragged[row]) for row in range(count)]
    return console.samples_table(
        texts(data.prompt),
        texts(data.chosen),
        {
            'score': chosen[:count].tolist(),
            'score of rejected': rejected[:count].tolist(),
        },
    )
