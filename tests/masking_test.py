"""The token layout, and sums that see real tokens only."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import masking

# The drawing in masking.py, P = 5, T = 4, and a row without padding.
MASK = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 0], [1] * 9], bool)
TOKENS = np.array([[0, 0, 2, 7, 8, 9, 5, 1, 0], [2, 3, 4, 5, 6, 7, 8, 9, 1]])


def _sequences():
  tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)
  return masking.join(tokens[:, :5], mask[:, :5], tokens[:, 5:], mask[:, 5:])


def test_wide_is_float32_or_the_wider():
  assert masking.wide(jnp.bfloat16) == jnp.float32
  assert masking.wide(jnp.float32) == jnp.float32
  with jax.enable_x64(True):
    assert masking.wide(jnp.float64) == jnp.float64


def test_positions_skip_left_padding():
  got = masking.positions(jnp.asarray(MASK))
  assert got.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5, 6], list(range(9))]
  assert got.dtype == jnp.int32


def test_causal_mask_by_hand():
  mask = jnp.array([[False, True, True, False], [True, True, True, True]])
  assert masking.causal_mask(mask).astype(int).tolist() == [
      [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]],
      [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
  ]


def test_join_and_response_columns():
  sequences = _sequences()
  np.testing.assert_array_equal(sequences.tokens_BL, TOKENS)
  np.testing.assert_array_equal(sequences.mask_BL, MASK)
  np.testing.assert_array_equal(sequences.response_mask_BT, MASK[:, 5:])
  assert masking.response_tokens(sequences).tolist() == [
      [9, 5, 1, 0],
      [7, 8, 9, 1],
  ]


def test_predictors_stand_one_column_before_the_response():
  got = masking.predictors(jnp.asarray(TOKENS), 4)
  assert got.tolist() == [[8, 9, 5, 1], [6, 7, 8, 9]]
  deep = jnp.asarray(TOKENS)[:, :, None]
  assert masking.predictors(deep, 4).shape == (2, 4, 1)


def test_last_real_token():
  mask = jnp.asarray(np.concatenate([MASK, np.zeros((1, 9), bool)]))
  assert masking.last_real(mask).tolist() == [7, 8, 0]
  last = masking.last_real(jnp.asarray(MASK))
  assert masking.at_index(jnp.asarray(TOKENS), last).tolist() == [1, 1]


def test_left_align_moves_the_padding_to_the_right():
  got = masking.left_align(jnp.asarray(TOKENS), jnp.asarray(MASK))
  assert got.tolist() == [[2, 7, 8, 9, 5, 1, 0, 0, 0], TOKENS[1].tolist()]


X = np.array([[1.5, 3, math.nan], [6, math.nan, math.nan], [math.nan] * 3])
REAL = np.isfinite(X)


def test_masked_sum_and_mean_by_hand():
  x, mask = jnp.asarray(X, jnp.float32), jnp.asarray(REAL)
  assert float(masking.masked_sum(x, mask)) == 10.5
  assert masking.masked_sum(x, mask, axis=1).tolist() == [4.5, 6, 0]
  assert float(masking.masked_mean(x, mask)) == 3.5
  assert masking.masked_mean(x, mask, axis=1).tolist() == [2.25, 6, 0]
  assert masking.masked_mean(x, mask, axis=0).tolist() == [3.75, 3, 0]


def test_masked_sum_of_bfloat16_is_float32():
  x = jnp.array([256, 1, 1], jnp.bfloat16)  # 257 is not a bfloat16 number
  got = masking.masked_sum(x, jnp.ones(3, bool))
  assert got.dtype == jnp.float32
  assert float(got) == 258


def test_whiten_by_hand():
  # Mean 3.5, variance (4 + .25 + 6.25) / 3 = 3.5.
  x, mask = jnp.asarray(X, jnp.float32), jnp.asarray(REAL)
  white = np.array([-2, -0.5, 2.5]) / math.sqrt(3.5)
  got = masking.masked_whiten(x, mask)
  np.testing.assert_allclose(got[mask], white, rtol=1e-6)
  assert not np.any(np.where(REAL, 0, got))
  kept = masking.masked_whiten(x, mask, shift_mean=False)
  np.testing.assert_allclose(kept[mask], white + 3.5, rtol=1e-6)
  assert not np.any(np.where(REAL, 0, kept))


def test_float64_stays_float64():
  with jax.enable_x64(True):
    x, mask = jnp.asarray(X, jnp.float64), jnp.asarray(REAL)
    got = masking.masked_whiten(x, mask, eps=0.0)
    assert got.dtype == jnp.float64
    assert float(masking.masked_mean(got, mask)) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize('reduce', [masking.masked_sum, masking.masked_mean])
def test_gradients_are_zero_on_padding_and_jit_agrees(reduce):
  x, mask = jnp.asarray(X, jnp.float32), jnp.asarray(REAL)
  cost = lambda x: jnp.sum(reduce(x, mask, axis=1) ** 3)
  grad = jax.jit(jax.grad(cost))(x)
  assert np.isfinite(grad).all()
  assert not np.any(np.where(REAL, 0, grad)) and np.all(grad[REAL])
  np.testing.assert_allclose(jax.jit(cost)(x), cost(x), rtol=1e-6)
