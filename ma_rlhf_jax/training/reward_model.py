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
from ma_rlhf_jax.training.loop import Program, Stage
from ma_rlhf_jax.training.run import Run


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


class RewardModel(Stage):
  """The second stage: a score that prefers chosen over rejected responses."""

  def __init__(self, run: Run, shape: GemmaConfig, params: Params):
    super().__init__(
        run, 'reward_model', run.config.reward_model, run.data.reward_model
    )
    c = self.config
    self.shown = ('loss/reward_model', 'reward_model/accuracy')
    self.shape = shape
    optimizer = optim.make_optimizer(c.optim, self.num_steps)
    self.learning_rate = optim.learning_rate(c.optim, self.num_steps)
    self.frozen, learning = lora.split(shape, params)
    self.states = {'reward_model': update.init_state(learning, optimizer)}
    on_padding = c.loss == LOSSES_ON_PADDING['reward_model.loss']
    self._step = jax.jit(
        functools.partial(
            _step,
            shape=kernels.plain(shape) if on_padding else shape,
            pair_loss=functools.partial(
                preference.pair_loss,
                loss=c.loss,
                pad_id=run.tokenizer.pad_token_id,
                num_padding_at_beginning=c.num_padding_at_beginning,
            ),
            optimizer=optimizer,
            num_micro=update.num_micro(c.batch_size, c.micro_batch_size),
        ),
        donate_argnums=0,
    )
    self._end_scores = jax.jit(functools.partial(_end_scores, shape=shape))

  def step(self, states: dict, index: int) -> tuple[dict, dict[str, Any]]:
    batch = self.run.batch(batches.pair_batch, self.data, self.rows(index))
    state = states['reward_model']
    state, metrics = self._step(state, self.frozen, batch)
    metrics['reward_model/lr'] = self.learning_rate(index)
    return {'reward_model': state}, metrics

  def programs(self) -> dict[str, Program]:
    rows = self.run.abstract_sequences(self.config.batch_size)
    state = checkpoint.abstract_of(self.states['reward_model'])
    frozen = checkpoint.abstract_of(self.frozen)
    args = (state, frozen, PairBatch(rows, rows))
    return {'reward_model/update': Program(self._step, args)}

  def params(self, states: dict) -> Params:
    """The parameters of the reward model."""
    return lora.join(self.frozen, states['reward_model'].params)

  def held_out_scores(self, states: dict) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the chosen and of the rejected held-out responses."""
    params = self.params(states)
    found = [
        map(gathered, self._end_scores(params, batch))
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
