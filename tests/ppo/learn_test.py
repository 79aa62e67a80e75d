"""Scores; updates of what is scored are PPO; minibatches see their rows."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.models.gemma import hidden_states
from ma_rlhf_jax.models.heads import token_scores
from ma_rlhf_jax.objective import losses, rewards, targets
from ma_rlhf_jax.ppo import learn
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    LossWeights,
    Models,
    Params,
    Scored,
    SequenceBatch,
    TrainState,
)
from ma_rlhf_jax.training import buckets, sft, update
from tests import tiny, tolerance
from tests.ppo import given

ROWS = [0, 1, 2, 3]
POLICY = tiny.params('policy', 0)
CRITIC = tiny.params('scalar', 1)
PARAMS = {'policy': POLICY, 'critic': CRITIC}
TEMPERATURE = 0.7
METHOD = given.method(TEMPERATURE)


# Scores.

_ALL = Models(
    policy=POLICY,
    ref_policy=tiny.params('policy', 1),
    critic=tiny.params('scalar', 2),
    reward_model=tiny.params('scalar', 3),
)


def _score(micro_rows: int) -> Callable[[Models, SequenceBatch], Scored]:
  split = buckets.Buckets((0,), (micro_rows,))
  return jax.jit(functools.partial(learn.score, method=METHOD, split=split))


@pytest.fixture(scope='module')
def scored_and_bounds() -> tuple[Scored, list[float]]:
  """What the four models say of rows in one batch, and how far it is off."""
  rows, score = tiny.sequences(ROWS), _score(4)
  return score(_ALL, rows), tiny.rounding(lambda p: score(p, rows), _ALL)


def test_each_model_fills_its_own_field(
    scored_and_bounds: tuple[Scored, list[float]],
):
  scored, bounds = scored_and_bounds
  rows = tiny.sequences(ROWS)
  logprobs = jax.jit(
      functools.partial(
          scoring.response_logprobs,
          dataclasses.replace(tiny.SHAPE, logprob_chunk=99),
          sequences=rows,
          temperature=TEMPERATURE,
          with_entropy=True,
      )
  )
  policy, entropy = logprobs(_ALL.policy)
  ref_policy, _ = logprobs(_ALL.ref_policy)
  values = jax.jit(functools.partial(scoring.response_values, tiny.SHAPE))
  scores = jax.jit(functools.partial(scoring.sequence_scores, tiny.SHAPE))
  want = Scored(
      logprobs_BT=policy,
      ref_logprobs_BT=ref_policy,
      entropy_BT=entropy,
      values_BT=values(_ALL.critic, rows),
      score_B=scores(_ALL.reward_model, rows),
  )
  tolerance.assert_close(scored, want, bounds)


def test_micro_batches_score_like_the_whole(
    scored_and_bounds: tuple[Scored, list[float]],
):
  found = _score(2)(_ALL, tiny.sequences(ROWS))
  tolerance.assert_close(found, *scored_and_bounds)


# Weights.


def test_each_model_weighs_the_tokens_that_its_loss_sees():
  mask = jnp.array([[True, True, True, False], [True, False, False, False]])
  starts = jnp.array([[True, False, True, False], [True, False, False, False]])
  weigh = lambda **how: learn.token_weights(
      ('policy', 'critic'), mask, starts, tiny.objective(**how)
  )
  found = weigh(critic_target='starts')
  # Of each row an equal share.
  policy = [[1 / 6, 1 / 6, 1 / 6, 0], [1 / 2, 0, 0, 0]]
  np.testing.assert_allclose(found['policy'].loss_BT, policy, rtol=1e-6)
  critic = [[1 / 4, 0, 1 / 4, 0], [1 / 2, 0, 0, 0]]
  np.testing.assert_allclose(found['critic'].loss_BT, critic, rtol=1e-6)
  same = weigh(critic_target='macro')
  np.testing.assert_allclose(same['critic'].loss_BT, policy, rtol=1e-6)
  # Three macro actions; metrics are means over tokens all the same.
  found = weigh(loss_reduction='macro')['policy']
  np.testing.assert_allclose(found.loss_BT, mask / 3, rtol=1e-6)
  np.testing.assert_allclose(found.metric_BT, mask / 4, rtol=1e-6)
  assert list(learn.token_weights(('critic',), mask, starts, METHOD.objective))


def test_only_macro_actions_have_to_be_known_to_weigh_by_them():
  mask = jnp.array([[True, True, True, False], [True, False, False, False]])
  weigh = lambda starts, **how: learn.token_weights(
      ('policy', 'critic'), mask, starts, tiny.objective(**how)
  )
  for reduction in ('sequence', 'token', 'constant'):
    known = weigh(mask, loss_reduction=reduction)
    unknown = weigh(None, loss_reduction=reduction)
    jax.tree.map(np.testing.assert_array_equal, known, unknown)
  with pytest.raises(TypeError):
    weigh(None, loss_reduction='macro')


# Losses.


def _new() -> Scored:
  """What the models say after an update: log-ratios of .3 and -.3."""
  moved = jnp.array([[0.3, -0.3, 0.3, 0], [0, 0.3, given.NAN, given.NAN]])
  return Scored(
      logprobs_BT=given.SCORED.logprobs_BT + moved,
      values_BT=given.SCORED.values_BT + 2 * moved,
  )


@pytest.mark.parametrize(
    'names', [('policy',), ('critic',), ('policy', 'critic')]
)
def test_each_model_that_has_weights_has_a_loss(names: tuple[str, ...]):
  experience, _ = given.experience()
  objective, macro = tiny.objective(critic_target='macro'), experience.macro
  weights = losses.loss_weights(
      given.MASK, macro.starts_BT, reduction='sequence'
  )
  found = learn.model_losses(
      _new(), experience, dict.fromkeys(names, weights), objective
  )
  assert tuple(found) == names
  aims, new = experience.targets, _new()
  want = {
      'policy': losses.policy_loss(
          new.logprobs_BT,
          given.SCORED.logprobs_BT,
          aims.advantages_BT,
          weights,
          macro,
          clip_eps=0.2,
          ratio='token',
      ),
      'critic': losses.value_loss(
          new.values_BT,
          given.SCORED.values_BT,
          aims.returns_BT,
          weights,
          given.MASK,
          clip_eps=0.2,
      ),
  }
  for name in names:
    loss, told = want[name]
    assert found[name] == told | {'loss': loss}
    assert 0 < told['clipfrac'] < 1


# Updates.


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


def _experience(
    width: int = tiny.PROMPT_LEN, kl_coef: float = 0.05, **fields: Any
) -> Experience:
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
  method = given.method(**fields)
  starts = termination.fixed(mask, ngram=method.rule.ngram)
  macro = termination.macro_actions(starts, mask)
  rewards_BT = rewards.token_rewards(
      scored.logprobs_BT,
      scored.ref_logprobs_BT,
      scored.score_B,
      mask,
      kl_coef=kl_coef,
      score_clip=2.5,
  )
  made = targets.estimate(scored.values_BT, rewards_BT, macro, method.objective)
  return Experience(rows, scored, macro, made)


def _update(
    name: str, experience: Experience, micro_rows: int
) -> tuple[TrainState, dict]:
  """`update_model` with plain gradient descent at rate 1."""
  optimizer = optax.sgd(1.0)
  run = functools.partial(
      learn.update_model,
      name=name,
      method=METHOD,
      optimizer=optimizer,
      epochs=1,
      minibatches=1,
      split=buckets.Buckets((0,), (micro_rows,)),
  )
  state = update.init_state(PARAMS[name], optimizer)
  return jax.jit(run)(state, {}, experience, jax.random.key(0))


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
  fields = {'ppo__gamma': 0.9, 'ppo__gae_lambda': 0.8, 'macro__ngram': 1}
  experience = _experience(kl_coef=0.1, **fields)
  params = PARAMS[model]
  plain = dict(zip(PARAMS, _plain_losses(experience), strict=True))[model]

  @jax.jit
  def step(params: Params) -> tuple[Array, Params, Array]:
    loss, grads = jax.value_and_grad(plain)(params)
    new = jax.tree.map(jnp.subtract, params, grads)
    return loss, new, optax.tree.norm(grads)

  state, metrics = _update(model, experience, micro_rows=2)
  assert 0 < metrics['clipfrac'] < 1  # both branches are there
  # The longest sums of a gradient go over all tokens.
  length = experience.sequences.tokens_BL.size
  bounds = tolerance.of_sums(step, (params,), length)
  found = metrics['loss'], state.params, metrics['grad_norm']
  tolerance.assert_close(found, step(params), bounds)
  assert metrics['grad_norm'] > 0.1 > 1e3 * max(bounds)


def _ppo_loss(name: str) -> Callable[[Experience, LossWeights], Array]:
  """The shipped loss of one model on rows with their weights."""
  models = Models(**dict.fromkeys(Models._fields) | PARAMS)

  def loss(experience: Experience, weights: LossWeights) -> Array:
    new = scoring.score_rows(
        METHOD.configs,
        models,
        experience.sequences,
        temperature=TEMPERATURE,
        width=None,
        only=(name,),
    )
    found = learn.model_losses(
        new, experience, {name: weights}, METHOD.objective
    )
    return found[name]['loss']

  return loss


def _sft_loss(experience: Experience, weights: LossWeights) -> Array:
  logprobs_BT, _ = sft.learned_logprobs(
      POLICY, experience.sequences, shape=tiny.SHAPE, loss_on='response'
  )
  return losses.sft_loss(logprobs_BT, weights.metric_BT)


@pytest.mark.parametrize(
    'loss_fn',
    [_ppo_loss('policy'), _ppo_loss('critic'), _sft_loss],
    ids=['policy', 'critic', 'sft'],
)
def test_padding_order_and_neighbours_change_no_loss(
    loss_fn: Callable[[Experience, LossWeights], Array],
):
  base = _experience()
  loss = jax.jit(loss_fn)
  macro = base.macro
  weights = losses.loss_weights(
      macro.mask_BT, macro.starts_BT, reduction='sequence'
  )
  want = loss(base, weights)
  wide = _experience(width=tiny.PROMPT_LEN + 3)
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
  experience = _experience()
  row = np.arange(count)
  grown = jax.tree.map(lambda x: x[row % len(ROWS)], experience)
  scored = grown.scored.replace(score_B=jnp.asarray(row, jnp.float32))
  return grown.replace(scored=scored)


# (params, experience, weights) -> loss and metrics.
_Toy = Callable[[Params, Experience, LossWeights], tuple[Array, dict]]


def _toy_update(
    state: TrainState,
    key: Array,
    loss: _Toy,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int = 1,
    minibatches: int = 1,
    micro_rows: int = 0,
) -> tuple[TrainState, dict]:
  """`update_model` of six rows, with a loss that asks no model."""

  def toy(learning: dict[str, Params], rows: Any, **unused: Any) -> tuple:
    found, metrics = loss(
        learning['policy'], rows.experience, rows.weights['policy']
    )
    return found, ({'policy': {'loss': found, **metrics}}, ())

  size = 6 // minibatches
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(learn, '_loss', toy)
    return learn.update_model(
        state,
        {},
        _numbered(6),
        key,
        name='policy',
        method=METHOD,
        optimizer=optimizer,
        epochs=epochs,
        minibatches=minibatches,
        split=buckets.Buckets((0,), (micro_rows or size,)),
    )


def _record(
    params: Params, experience: Experience, weights: LossWeights
) -> tuple[Array, dict]:
  """Descent at rate 1 counts updates, and the rows that each has seen."""
  now = jax.lax.stop_gradient(params['updates'])
  row = experience.scored.score_B.astype(jnp.int32)
  seen = params['seen'][now.astype(jnp.int32), row]
  # The weights of a minibatch add up to 1, in micro-batches too.
  loss = -jnp.sum(seen) - params['updates'] * jnp.sum(weights.loss_BT)
  return loss, {'update': now * jnp.sum(weights.loss_BT)}


def _seen(key: Array, **how: int) -> tuple[np.ndarray, dict]:
  """[updates, 6 rows], how often each update has seen each row."""
  optimizer = optax.sgd(1.0)
  params = {'updates': jnp.zeros(()), 'seen': jnp.zeros((9, 6))}
  start = update.init_state(params, optimizer)
  state, metrics = _toy_update(start, key, _record, optimizer, **how)
  updates = int(state.step)
  assert not state.params['seen'][updates:].any()
  return np.asarray(state.params['seen'][:updates]), metrics


def test_every_epoch_sees_every_row_once():
  key = jax.random.key(0)
  how = {'epochs': 3, 'minibatches': 2}
  seen, metrics = _seen(key, **how)
  assert seen.shape == (6, 6)
  assert (seen.sum(1) == 3).all()  # rows of an update
  epochs = seen.reshape(3, 2, 6)
  np.testing.assert_array_equal(epochs.sum(1), np.ones((3, 6)))
  assert (epochs[0] != epochs[1]).any() or (epochs[1] != epochs[2]).any()
  np.testing.assert_allclose(metrics['update'], 2.5, rtol=1e-6)  # mean 0 .. 5
  other, _ = _seen(jax.random.key(1), **how)
  assert (other != seen).any()
  again, _ = _seen(key, **how, micro_rows=1)
  np.testing.assert_array_equal(again, seen)


def test_one_epoch_of_one_minibatch_is_one_update():
  seen, metrics = _seen(jax.random.key(0))
  np.testing.assert_array_equal(seen, np.ones((1, 6)))
  assert float(metrics['update']) == 0


def test_updates_follow_each_other():
  key, optimizer = jax.random.key(0), optax.adam(0.1)
  experience = _numbered(6)

  def loss(
      params: Params, rows: Experience, weights: LossWeights
  ) -> tuple[Array, dict]:
    x_BT = jnp.sin(params['x'] * rows.scored.score_B)[:, None] * weights.loss_BT
    return jnp.sum(x_BT), {}

  start = update.init_state({'x': jnp.array(0.3)}, optimizer)
  how = {'epochs': 2, 'minibatches': 3}
  state, metrics = _toy_update(start, key, loss, optimizer, **how)
  want, seen_losses = start, []
  for rows in _seen(key, **how)[0] > 0:
    batch = jax.tree.map(lambda x, r=rows: x[r], experience)
    weights = losses.loss_weights(
        batch.macro.mask_BT, batch.macro.starts_BT, reduction='sequence'
    )
    want, found = update.train_step(
        want,
        (batch, weights),
        loss_fn=lambda params, both: loss(params, *both),
        optimizer=optimizer,
        num_micro=1,
    )
    seen_losses.append(float(found['loss']))
  assert int(state.step) == 6
  np.testing.assert_allclose(state.params['x'], want.params['x'], rtol=1e-5)
  np.testing.assert_allclose(metrics['loss'], np.mean(seen_losses), rtol=1e-5)
  assert abs(float(state.params['x']) - 0.3) > 0.1
