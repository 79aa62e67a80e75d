"""Supervised fine-tuning on the chosen responses."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ma_rlhf_jax import masking
from ma_rlhf_jax.config import LOSSES_ON_PADDING
from ma_rlhf_jax.data import batches
from ma_rlhf_jax.models import kernels, lora
from ma_rlhf_jax.models.gemma import hidden_and_head
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.objective.losses import sft_loss, token_weights
from ma_rlhf_jax.rollout.logprobs import token_logprobs
from ma_rlhf_jax.structs import Array, Params, SequenceBatch, TrainState
from ma_rlhf_jax.training import checkpoint, judge, optim, update
from ma_rlhf_jax.training.loop import Stage
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.spec import Program, Spec


def _response(sequences: SequenceBatch) -> tuple[Array, Array, Array]:
  """The response, EOS included."""
  return sequences.tokens_BL, sequences.mask_BL, sequences.response_mask_BT


def _text(sequences: SequenceBatch) -> tuple[Array, Array, Array]:
  """Prompt and response: every real token after BOS."""
  mask_BL = sequences.mask_BL
  return sequences.tokens_BL, mask_BL, mask_BL[:, 1:] & mask_BL[:, :-1]


def _everything(sequences: SequenceBatch) -> tuple[Array, Array, Array]:
  """All columns of right-padded rows, pads too, as the authors do.

  Rows without a token, which fill up a batch, are not learned.
  """
  mask_BL = sequences.mask_BL
  tokens_BL = masking.left_align(sequences.tokens_BL, mask_BL)
  mask_BL = masking.left_align(mask_BL, mask_BL)
  real_B1 = jnp.any(mask_BL, axis=1, keepdims=True)
  return tokens_BL, mask_BL, jnp.broadcast_to(real_B1, mask_BL[:, 1:].shape)


# config.sft.loss_on -> tokens_BL, mask_BL and learned_BW: which of the last W
# columns are learned. Only those reach the vocabulary head.
LOSS_ON: dict[str, Callable[[SequenceBatch], tuple[Array, Array, Array]]] = {
    'response': _response,
    'text': _text,
    'everything': _everything,
}


def learned_logprobs(
    params: Params,
    sequences: SequenceBatch,
    *,
    shape: GemmaConfig,
    loss_on: str,
) -> tuple[Array, Array]:
  """(logprobs_BW, learned_BW): nats at temperature 1, and what is learned."""
  tokens_BL, mask_BL, learned_BW = LOSS_ON[loss_on](sequences)
  width = learned_BW.shape[1]
  hidden_BLD, head_VD = hidden_and_head(
      shape, params, tokens_BL, mask_BL, width + 1
  )
  logprobs_BW, _ = token_logprobs(
      masking.predictors(hidden_BLD, width),
      head_VD,
      tokens_BL[:, -width:],
      softcap=shape.final_softcap,
      temperature=1.0,
      chunk_tokens=shape.logprob_chunk,
  )
  return logprobs_BW, learned_BW


def _step(
    state: TrainState,
    frozen: Params,
    sequences: SequenceBatch,
    *,
    logprobs: Callable[..., tuple[Array, Array]],
    loss_on: str,
    optimizer: optax.GradientTransformation,
    num_micro: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update; the loss is a mean over the learned tokens of the batch."""

  def loss_fn(params: Params, batch: Any) -> tuple[Array, dict[str, Array]]:
    sequences, weights_BW = batch
    logprobs_BW, _ = logprobs(lora.join(frozen, params), sequences)
    return sft_loss(logprobs_BW, weights_BW), {}

  _, _, learned_BW = LOSS_ON[loss_on](sequences)
  state, metrics = update.train_step(
      state,
      (sequences, token_weights(learned_BW)),
      loss_fn=loss_fn,
      optimizer=optimizer,
      num_micro=num_micro,
  )
  return state, {
      'loss/sft': metrics['loss'],
      'policy/grad_norm': metrics['grad_norm'],
      'tokens': jnp.sum(sequences.mask_BL, dtype=jnp.int32),
  }


def _held_out_sums(
    params: Params,
    sequences: SequenceBatch,
    *,
    logprobs: Callable[..., tuple[Array, Array]],
) -> tuple[Array, Array]:
  """Negative log-likelihood (nats) and number of the learned tokens."""
  logprobs_BW, learned_BW = logprobs(params, sequences)
  count = jnp.sum(learned_BW, dtype=jnp.int32)
  return -masking.masked_sum(logprobs_BW, learned_BW), count


class Programs:
  """The programs of SFT; of abstract parameters they can be compiled only.

  Attributes:
    frozen: parameters of the policy that do not learn, see `models.lora`.
    abstract_states: shapes of what is trained.
    learning_rate: of an update, by its number.
    update: (state, frozen, sequences) -> new state and metrics.
    held_out_sums: (parameters, sequences) -> see there.
  """

  def __init__(
      self, spec: Spec, model: GemmaConfig, params: Params, num_steps: int
  ):
    """Traces nothing yet.

    Args:
      spec: what they are made from.
      model: the policy.
      params: its parameters, from which it starts.
      num_steps: updates in all.
    """
    c = spec.config.sft
    self._spec, self._model = spec, model
    self._optimizer = optim.make_optimizer(c.optim, num_steps)
    self.learning_rate = optim.learning_rate(c.optim, num_steps)
    self.frozen, _ = lora.split(model, params)
    self.abstract_states = self.init_states(checkpoint.abstract_of(params))
    on_padding = c.loss_on == LOSSES_ON_PADDING['sft.loss_on']
    logprobs = functools.partial(
        learned_logprobs,
        shape=kernels.plain(model) if on_padding else model,
        loss_on=c.loss_on,
    )
    self.update = jax.jit(
        functools.partial(
            _step,
            logprobs=logprobs,
            loss_on=c.loss_on,
            optimizer=self._optimizer,
            num_micro=update.num_micro(c.batch_size, c.micro_batch_size),
        ),
        donate_argnums=0,
    )
    self.held_out_sums = jax.jit(
        functools.partial(_held_out_sums, logprobs=logprobs)
    )

  def init_states(self, params: Params) -> dict[str, TrainState]:
    """What is trained, before the first update."""
    _, learning = lora.split(self._model, params)
    return {'policy': update.init_state(learning, self._optimizer)}

  def listing(self) -> dict[str, Program]:
    """What a step runs, by name."""
    batch = self._spec.abstract_sequences(self._spec.config.sft.batch_size)
    frozen = checkpoint.abstract_of(self.frozen)
    args = (self.abstract_states['policy'], frozen, batch)
    return {'sft/update': Program(self.update, args)}


class SFT(Stage):
  """The first stage: a policy that imitates the chosen responses."""

  def __init__(self, run: Run, shape: GemmaConfig, params: Params):
    super().__init__(run, 'sft', run.config.sft, run.data.sft)
    self.shown = ('loss/sft',)
    self.shape = shape
    self.programs = Programs(run.spec, shape, params, self.num_steps)
    self.states = self.programs.init_states(params)

  def step(self, states: dict, index: int) -> tuple[dict, dict[str, Any]]:
    batch = self.run.batch(batches.sft_batch, self.data, self.rows(index))
    p = self.programs
    policy, metrics = p.update(states['policy'], p.frozen, batch)
    metrics['policy/lr'] = p.learning_rate(index)
    return {'policy': policy}, metrics

  def params(self, states: dict) -> Params:
    """The parameters of the policy."""
    return lora.join(self.programs.frozen, states['policy'].params)

  def evaluate(self, states: dict) -> dict[str, float]:
    sums = [
        self.programs.held_out_sums(self.params(states), batch)
        for batch in self.run.held_out(batches.sft_batch, self.micro_size)
    ]
    nll, count = (float(sum(column)) for column in zip(*sums, strict=True))
    return {'eval/loss': nll / count}

  def samples(self, states: dict) -> str:
    count = self.run.config.log.samples
    judged = judge.judge(
        self.run,
        judge.Model(self.shape, self.params(states)),
        num_prompts=count,
        stream='evaluate',
        temperature=self.run.config.rollout.temperature,
    )
    return judged.table(count)
