"""The updates on a scored experience are PPO; minibatches see their rows."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.models.gemma import hidden_states
from ma_rlhf_jax.models.heads import token_scores
from ma_rlhf_jax.objective import losses
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    LossWeights,
    Params,
    Scored,
    SequenceBatch,
    TrainState,
)
from ma_rlhf_jax.training import ppo_update, sft, update
from ma_rlhf_jax.training.experience import make_targets
from tests import tiny, tolerance

ROWS = [0, 1, 2, 3]
POLICY = tiny.params('policy', 0)
CRITIC = tiny.params('scalar', 1)
TEMPERATURE = 0.7
_policy_loss = functools.partial(
    ppo_update.policy_loss_fn,
    shape=tiny.SHAPE,
    clip_eps=0.2,
    ratio='token',
    temperature=TEMPERATURE,
    chunk_tokens=8,
)
_value_loss = functools.partial(
    ppo_update.value_loss_fn, shape=tiny.SHAPE, config=tiny.config().critic
)


def _sft_loss(params: Params, batch: ppo_update.Batch) -> tuple[Array, dict]:
  experience, weights = batch
  logprobs_BT, _ = sft.learned_logprobs(
      params,
      experience.sequences,
      shape=tiny.SHAPE,
      loss_on='response',
      chunk_tokens=8,
  )
  return losses.sft_loss(logprobs_BT, weights.metric_BT), {}


def _plain_logprobs(params: Params, rows: SequenceBatch) -> Array:
  """[B, T] from all logits at once."""
  hidden = hidden_states(tiny.SHAPE, params, rows.tokens_BL, rows.mask_BL)
  logits = hidden @ params['embedding'].T / TEMPERATURE
  chosen = rows.tokens_BL[:, 1:, None]
  logp = jax.nn.log_softmax(logits[:, :-1])
  return jnp.take_along_axis(logp, chosen, -1)[:, -tiny.RESPONSE_LEN :, 0]


def _plain_values(params: Params, rows: SequenceBatch) -> Array:
  """[B, T]: the critic's values of the states before the tokens."""
  values = token_scores(tiny.SHAPE, params, rows.tokens_BL, rows.mask_BL)
  return values[:, tiny.PROMPT_LEN - 1 : -1]


@functools.cache
def _old() -> tuple[np.ndarray, np.ndarray]:
  """Log-probs and values from before the update, near those of now."""
  rows, random = tiny.sequences(ROWS), np.random.default_rng(0)
  noise = 0.25 * random.normal(size=(2, len(ROWS), tiny.RESPONSE_LEN))
  old = jax.jit(_plain_logprobs)(POLICY, rows) + noise[0]
  return np.asarray(old), jax.jit(_plain_values)(CRITIC, rows) + noise[1]


def _experience(config: ConfigDict, width: int = tiny.PROMPT_LEN) -> Experience:
  """Rows of `tiny`, with made-up reference log-probs and scores."""
  random = np.random.default_rng(1)
  rows = tiny.sequences(ROWS, width=width)
  mask = rows.response_mask_BT
  logprobs, values = _old()
  pads = lambda x: jnp.where(mask, jnp.asarray(x, jnp.float32), jnp.nan)
  scored = Scored(
      logprobs_BT=pads(logprobs),
      ref_logprobs_BT=pads(logprobs + 0.3 * random.normal(size=mask.shape)),
      entropy_BT=pads(logprobs),
      values_BT=pads(values),
      score_B=jnp.array([0.7, -1.2, 4.0, 0.4]),
  )
  starts = termination.fixed(mask, ngram=config.macro.ngram)
  macro = termination.macro_actions(starts, mask)
  targets, _ = make_targets(scored, macro, config)
  return Experience(rows, scored, macro, targets)


def _weigh(batch: Experience, reduction: str = 'sequence') -> LossWeights:
  return losses.loss_weights(
      batch.macro.mask_BT, batch.macro.starts_BT, reduction=reduction
  )


def _update(
    params: Params, experience: Experience, loss_fn: update.LossFn, **fields
) -> tuple[TrainState, dict]:
  """`update_on` with plain gradient descent at rate 1."""
  optimizer = optax.sgd(1.0)
  run = functools.partial(
      ppo_update.update_on,
      loss_fn=loss_fn,
      weigh=_weigh,
      optimizer=optimizer,
      ppo=tiny.config(**fields).ppo,
  )
  state = update.init_state(params, optimizer)
  return jax.jit(run)(state, {}, experience, jax.random.key(5))


# Token-level PPO, as a textbook has it.


def _plain_targets(experience: Experience) -> tuple[list, list]:
  """Advantages and returns of each row, gamma .9 and lambda .8."""
  s = jax.tree.map(lambda x: np.asarray(x, np.float64), experience.scored)
  advantages, returns = [], []
  for row, count in enumerate(np.asarray(experience.macro.mask_BT).sum(1)):
    rewards = -0.1 * (s.logprobs_BT - s.ref_logprobs_BT)[row, :count]
    rewards[-1] += np.clip(s.score_B[row], -2.5, 2.5)
    values = [*s.values_BT[row, :count], 0.0]
    later, found = 0.0, []
    for t in reversed(range(count)):
      delta = rewards[t] + 0.9 * values[t + 1] - values[t]
      later = delta + 0.9 * 0.8 * later
      found.append(later)
    advantages.append(np.float32(found[::-1]))
    returns.append(np.float32(advantages[-1] + values[:-1]))
  return advantages, returns


def _plain_losses(experience: Experience) -> tuple[Callable, Callable]:
  """The losses of policy and critic as functions of their parameters."""
  rows, scored = experience.sequences, experience.scored
  advantages, returns = _plain_targets(experience)

  def policy(params: Params) -> Array:
    logprobs, total = _plain_logprobs(params, rows), 0.0
    for row, advantage in enumerate(advantages):
      n = len(advantage)
      ratio = jnp.exp(logprobs[row, :n] - scored.logprobs_BT[row, :n])
      clipped = jnp.clip(ratio, 0.8, 1.2)
      gain = jnp.minimum(ratio * advantage, clipped * advantage)
      total -= jnp.mean(gain) / len(advantages)
    return total

  def critic(params: Params) -> Array:
    values, total = _plain_values(params, rows), 0.0
    for row, target in enumerate(returns):
      n = len(target)
      now, old = values[row, :n], scored.values_BT[row, :n]
      clipped = old + jnp.clip(now - old, -0.2, 0.2)
      error = jnp.maximum((now - target) ** 2, (clipped - target) ** 2)
      total += jnp.mean(error) / 2 / len(returns)
    return total

  return policy, critic


@pytest.mark.parametrize('model', ['policy', 'critic'])
def test_one_token_macros_are_plain_ppo(model: str):
  fields = {'ppo__kl_coef': 0.1, 'ppo__gamma': 0.9, 'ppo__gae_lambda': 0.8}
  experience = _experience(tiny.config(macro__ngram=1, **fields))
  params, loss_fn, plain = {
      'policy': (POLICY, _policy_loss, _plain_losses(experience)[0]),
      'critic': (CRITIC, _value_loss, _plain_losses(experience)[1]),
  }[model]

  @jax.jit
  def step(params: Params) -> tuple[Array, Params, Array]:
    loss, grads = jax.value_and_grad(plain)(params)
    new = jax.tree.map(jnp.subtract, params, grads)
    return loss, new, optax.tree.norm(grads)

  state, metrics = _update(params, experience, loss_fn, ppo__micro_batch_size=2)
  assert 0 < metrics['clipfrac'] < 1  # both branches are there
  # The longest sums of a gradient go over all tokens.
  length = experience.sequences.tokens_BL.size
  bounds = tolerance.of_sums(step, (params,), length)
  found = metrics['loss'], state.params, metrics['grad_norm']
  tolerance.assert_close(found, step(params), bounds)
  assert metrics['grad_norm'] > 0.1 > 1e3 * max(bounds)


@pytest.mark.parametrize(
    'params, loss_fn',
    [(POLICY, _policy_loss), (CRITIC, _value_loss), (POLICY, _sft_loss)],
    ids=['policy', 'critic', 'sft'],
)
def test_padding_order_and_neighbours_change_no_loss(
    params: Params, loss_fn: update.LossFn
):
  config = tiny.config()
  base = _experience(config)
  loss_fn = jax.jit(loss_fn)
  loss = lambda experience, weights: float(
      loss_fn(params, (experience, weights))[0]
  )
  weights = _weigh(base)
  want = loss(base, weights)
  wide = _experience(config, width=tiny.PROMPT_LEN + 3)
  order = np.array([2, 0, 3, 1])
  moved = jax.tree.map(lambda x: x[order], base)
  tokens = jnp.where(base.sequences.mask_BL, base.sequences.tokens_BL, 9)
  other = base.replace(sequences=base.sequences.replace(tokens_BL=tokens))
  halves = [
      jax.tree.map(lambda x, r=rows: x[r], (base, weights))
      for rows in (np.array([0, 3]), np.array([1, 2]))
  ]
  found = [
      loss(wide, weights),
      loss(moved, jax.tree.map(lambda x: x[order], weights)),
      loss(other, weights),
      sum(loss(*half) for half in halves),
  ]
  np.testing.assert_allclose(found, [want] * 4, rtol=1e-5, atol=1e-6)


# Which row is seen in which update.


def _numbered(count: int) -> Experience:
  """An experience whose score is the number of the row."""
  experience = _experience(tiny.config())
  row = np.arange(count)
  grown = jax.tree.map(lambda x: x[row % len(ROWS)], experience)
  scored = grown.scored.replace(score_B=jnp.asarray(row, jnp.float32))
  return grown.replace(scored=scored)


def _record(params: Params, batch: ppo_update.Batch) -> tuple[Array, dict]:
  """Descent at rate 1 counts updates, and the rows that each has seen."""
  experience, weights = batch
  now = jax.lax.stop_gradient(params['updates'])
  row = experience.scored.score_B.astype(jnp.int32)
  seen = params['seen'][now.astype(jnp.int32), row]
  # The weights of a minibatch add up to 1, in micro-batches too.
  loss = -jnp.sum(seen) - params['updates'] * jnp.sum(weights.loss_BT)
  return loss, {'update': now * jnp.sum(weights.loss_BT)}


def _seen(key: Array, **fields: Any) -> tuple[np.ndarray, dict]:
  """[updates, 6 rows], how often each update has seen each row."""
  optimizer = optax.sgd(1.0)
  params = {'updates': jnp.zeros(()), 'seen': jnp.zeros((9, 6))}
  state, metrics = ppo_update.update_on(
      update.init_state(params, optimizer),
      {},
      _numbered(6),
      key,
      loss_fn=_record,
      weigh=_weigh,
      optimizer=optimizer,
      ppo=tiny.config(**fields).ppo,
  )
  updates = int(state.step)
  assert not state.params['seen'][updates:].any()
  return np.asarray(state.params['seen'][:updates]), metrics


def test_every_epoch_sees_every_row_once():
  key = jax.random.key(0)
  fields = {'ppo__ppo_epochs': 3, 'ppo__minibatches': 2}
  seen, metrics = _seen(key, **fields)
  assert seen.shape == (6, 6)
  assert (seen.sum(1) == 3).all()  # rows of an update
  epochs = seen.reshape(3, 2, 6)
  np.testing.assert_array_equal(epochs.sum(1), np.ones((3, 6)))
  assert (epochs[0] != epochs[1]).any() or (epochs[1] != epochs[2]).any()
  np.testing.assert_allclose(metrics['update'], 2.5, rtol=1e-6)  # mean 0 .. 5
  other, _ = _seen(jax.random.key(1), **fields)
  assert (other != seen).any()
  again, _ = _seen(key, **fields, ppo__micro_batch_size=1)
  np.testing.assert_array_equal(again, seen)


def test_one_epoch_of_one_minibatch_is_one_update():
  seen, metrics = _seen(jax.random.key(0))
  np.testing.assert_array_equal(seen, np.ones((1, 6)))
  assert float(metrics['update']) == 0


def test_updates_follow_each_other():
  key, optimizer = jax.random.key(0), optax.adam(0.1)
  experience = _numbered(6)

  def loss_fn(params: Params, batch: ppo_update.Batch) -> tuple[Array, dict]:
    rows, weights = batch
    x_BT = jnp.sin(params['x'] * rows.scored.score_B)[:, None] * weights.loss_BT
    return jnp.sum(x_BT), {}

  how = {'loss_fn': loss_fn, 'optimizer': optimizer}
  start = update.init_state({'x': jnp.array(0.3)}, optimizer)
  fields = {'ppo__ppo_epochs': 2, 'ppo__minibatches': 3}
  state, metrics = ppo_update.update_on(
      start,
      {},
      experience,
      key,
      weigh=_weigh,
      ppo=tiny.config(**fields).ppo,
      **how,
  )
  want, seen_losses = start, []
  for rows in _seen(key, **fields)[0] > 0:
    batch = jax.tree.map(lambda x, r=rows: x[r], experience)
    want, found = update.train_step(
        want, (batch, _weigh(batch)), num_micro=1, **how
    )
    seen_losses.append(float(found['loss']))
  assert int(state.step) == 6
  np.testing.assert_allclose(state.params['x'], want.params['x'], rtol=1e-5)
  np.testing.assert_allclose(metrics['loss'], np.mean(seen_losses), rtol=1e-5)
  assert abs(float(state.params['x']) - 0.3) > 0.1
