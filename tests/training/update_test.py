"""Accumulated gradients equal those of one large batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ma_rlhf_jax.objective import losses
from ma_rlhf_jax.structs import Array
from ma_rlhf_jax.training import update

# Ragged: two rows are one token long, one is empty.
LENGTHS = np.array([3, 5, 0, 1, 4, 1, 2, 5])
MASK = np.arange(5)[None] < LENGTHS[:, None]
STARTS = MASK & (np.arange(5)[None] % 2 == 0)
PARAMS = {'w': np.array([0.3, -0.7, 1.1]), 'b': np.array(0.2)}


def _batch(reduction: str = 'sequence') -> tuple:
  random = np.random.default_rng(0)
  x = random.normal(size=(8, 5, 3))
  returns = np.where(MASK, random.normal(size=(8, 5)), np.nan)
  weights = losses.loss_weights(
      jnp.asarray(MASK), jnp.asarray(STARTS), reduction=reduction
  )
  return jax.tree.map(jnp.asarray, (x, returns, weights, MASK))


def _loss(params: dict, batch: tuple) -> tuple[Array, dict[str, Array]]:
  """A critic that is linear in its inputs."""
  x_BTD, returns_BT, weights, mask_BT = batch
  values_BT = x_BTD @ params['w'] + params['b']
  return losses.value_loss(
      values_BT,
      jnp.zeros_like(values_BT),
      returns_BT,
      weights,
      mask_BT,
      clip_eps=0.2,
  )


@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_micro_batches_add_up_to_the_batch(reduction: str):
  with jax.enable_x64(True):
    params, batch = jax.tree.map(jnp.asarray, PARAMS), _batch(reduction)
    want, want_metrics = update.accumulate_gradients(_loss, params, batch, 1)
    plain = jax.grad(lambda p: _loss(p, batch)[0])(params)
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-14)
    jax.tree.map(same, want, plain)
    assert 0 < want_metrics['clipfrac'] < 1
    for num in (2, 4, 8):
      got, metrics = jax.jit(
          functools.partial(update.accumulate_gradients, _loss, num_micro=num)
      )(params, batch)
      jax.tree.map(same, got, want)
      assert metrics.keys() == {'loss', 'clipfrac', 'weight'}
      jax.tree.map(same, metrics, want_metrics)


def test_weights_of_each_micro_batch_alone_would_differ():
  # Why weights are made before the batch is cut: rows per micro-batch differ.
  x, returns, weights, mask = _batch()
  halves = [
      losses.loss_weights(mask[rows], mask[rows], reduction='sequence').loss_BT
      / 2
      for rows in (slice(0, None, 2), slice(1, None, 2))
  ]
  assert np.abs(halves[0] - weights.loss_BT[::2]).max() > 0.01


def test_only_one_micro_batch_is_seen_at_a_time():
  seen = []

  def loss(params: dict, batch: tuple) -> tuple[Array, dict]:
    seen.append(batch[0].shape)
    return _loss(params, batch)

  update.accumulate_gradients(loss, PARAMS, _batch(), 4)
  assert set(seen) == {(2, 5, 3)}


def _step(num_micro: int = 1, optimizer=None) -> tuple:
  optimizer = optimizer or optax.sgd(0.5)
  state = update.init_state(jax.tree.map(jnp.float32, PARAMS), optimizer)
  new, metrics = update.train_step(
      state,
      _batch(),
      loss_fn=_loss,
      optimizer=optimizer,
      num_micro=num_micro,
  )
  return state, new, metrics


def test_train_step_moves_against_the_gradient():
  state, new, metrics = _step()
  grads = jax.grad(lambda p: _loss(p, _batch())[0])(state.params)
  want = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new.params, want
  )
  assert int(state.step) == 0 and int(new.step) == 1
  assert new.step.dtype == jnp.int32
  norm = np.sqrt(float(grads['b']) ** 2 + (np.asarray(grads['w']) ** 2).sum())
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
  np.testing.assert_allclose(
      metrics['loss'], _loss(state.params, _batch())[0], rtol=1e-6
  )


def test_grad_norm_is_that_before_clipping():
  clipped = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.5))
  state, new, metrics = _step(optimizer=clipped)
  _, _, free = _step()
  np.testing.assert_allclose(metrics['grad_norm'], free['grad_norm'], rtol=1e-6)
  moved = jax.tree.map(jnp.subtract, new.params, state.params)
  # Four numbers up to 1.1, each rounded by 6e-8 at most: 2.4e-4 of the step.
  np.testing.assert_allclose(optax.tree.norm(moved), 0.5e-3, rtol=1e-3)


def test_optimizer_state_is_carried_on():
  optimizer = optax.adam(0.1)
  state, new, _ = _step(2, optimizer)
  assert int(new.opt_state[0].count) == 1
  assert float(jnp.abs(new.opt_state[0].mu['w']).min()) > 0
  assert not state.opt_state[0].mu['w'].any()


def test_number_of_micro_batches():
  assert update.num_micro(64, 0) == 1
  assert update.num_micro(64, 16) == 4
  assert update.num_micro(64, 64) == 1


def test_bfloat16_gradients_of_many_micro_batches_are_not_lost():
  # 512 rows of gradient 1/512; a bfloat16 sum stops at 0.5.
  params = {'w': jnp.ones((), jnp.bfloat16)}
  rows = jnp.full((512, 1), 1 / 512, jnp.bfloat16)
  loss = lambda params, rows: (jnp.sum(params['w'] * rows), {})
  grads, metrics = jax.jit(
      lambda p, x: update.accumulate_gradients(loss, p, x, 512)
  )(params, rows)
  assert grads['w'].dtype == jnp.bfloat16
  assert float(grads['w']) == 1.0
  assert float(metrics['loss']) == 1.0
