"""Pooling into macro actions and spreading back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import aggregate, termination

# Macro actions of 3 + 2 and 1 + 4 tokens; row 2 has no token.
STARTS = np.array([[1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6], bool)
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [0] * 6], bool)
X = np.array([[2, 4, 6, 1, 3, 9], [5, 1, 2, 4, 8, 9], [9] * 6], 'float32')
pool = jax.jit(aggregate.pool, static_argnames='weights')
macro_actions = jax.jit(termination.macro_actions)


def _macro(starts: np.ndarray = STARTS, mask: np.ndarray = MASK):
  return jax.device_get(macro_actions(starts, mask))


@pytest.mark.parametrize(
    ('weights', 'want'),
    [
        ('sum', [[12, 4], [5, 15]]),  # 2 + 4 + 6, 1 + 3; 5, 1 + 2 + 4 + 8
        ('mean', [[4, 2], [5, 3.75]]),  # 12/3, 4/2; 5/1, 15/4
        ('equal', [[4, 2], [5, 3.75]]),
        ('start', [[2, 1], [5, 1]]),
        ('unit', [[6, 3], [5, 8]]),
        # 3 tokens: H = 11/6, weights 2/11 3/11 6/11: (4 + 12 + 36)/11
        # 2 tokens: H = 3/2, weights 1/3 2/3: (1 + 6)/3
        # 4 tokens: H = 25/12, weights 3/25 4/25 6/25 12/25:
        #   (3 + 8 + 24 + 96)/25
        ('position', [[52 / 11, 7 / 3], [5, 131 / 25]]),
    ],
)
def test_pool_by_hand(weights: str, want: list[list[float]]):
  got = pool(X, _macro(), weights=weights)
  assert got.shape == (3, 6)
  np.testing.assert_allclose(got[:2, :2], want, rtol=1e-6)
  assert not np.any(got[:, 2:]) and not np.any(got[2])


@pytest.mark.parametrize('weights', aggregate.WEIGHTS)
def test_one_token_macro_actions_pool_to_themselves(weights: str):
  got = pool(jnp.asarray(X), _macro(starts=MASK), weights=weights)
  np.testing.assert_array_equal(got, np.where(MASK, X, 0))


def test_sums_over_macro_actions_are_sums_over_tokens():
  rng = np.random.default_rng(1)
  mask = np.arange(30)[None] < rng.integers(0, 31, size=(8, 1))
  macro = _macro(rng.random((8, 30)) < 0.3, mask)
  with jax.enable_x64(True):
    x = jnp.asarray(rng.normal(size=(8, 30)))
    got = pool(x, macro, weights='sum')
    assert got.dtype == jnp.float64
  want = np.where(mask, x, 0).sum(axis=1)
  got = np.asarray(got).sum(axis=1)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize('weights', aggregate.WEIGHTS)
def test_padding_row_order_and_jit_change_nothing(weights: str):
  base = pool(X, _macro(), weights=weights)
  nan = jnp.asarray(np.where(MASK, X, np.nan))
  np.testing.assert_array_equal(pool(nan, _macro(), weights=weights), base)
  plain = aggregate.pool(jnp.asarray(X), _macro(), weights=weights)
  np.testing.assert_allclose(plain, base, rtol=1e-6)
  order = np.array([2, 0, 1])
  moved = pool(
      jnp.asarray(X[order]), _macro(STARTS[order], MASK[order]), weights=weights
  )
  np.testing.assert_array_equal(moved, base[order])


def test_pool_has_no_gradient_on_padding():
  macro = _macro()
  cost = lambda x: jnp.sum(aggregate.pool(x, macro, weights='sum') ** 2)
  grad = jax.jit(jax.grad(cost))(jnp.asarray(np.where(MASK, X, np.nan)))
  # Twice the sum of the macro action: 24, 8; 10, 30.
  assert grad.tolist() == [
      [24, 24, 24, 8, 8, 0],
      [10, 30, 30, 30, 30, 0],
      [0, 0, 0, 0, 0, 0],
  ]


def test_pool_of_bfloat16_adds_in_float32():
  # 256 + 1 is not a bfloat16 number.
  x = jnp.array([[256, 1, 1, 0, 0, 0]], jnp.bfloat16)
  macro = _macro(STARTS[:1], MASK[:1])
  got = pool(x, macro, weights='sum')
  assert got.dtype == jnp.float32
  assert float(got[0, 0]) == 258


def test_spread_gives_each_token_its_macro_action():
  x = jnp.array([[7, 8, jnp.nan, 1, 1, 1], [3, 4, 1, 1, 1, 1], [9] * 6])
  assert aggregate.spread(x, _macro()).tolist() == [
      [7, 7, 7, 8, 8, 0],
      [3, 4, 4, 4, 4, 0],
      [0, 0, 0, 0, 0, 0],
  ]


def test_places_lengths_and_ends():
  macro = _macro()
  assert aggregate.lengths(macro)[:, :3].tolist() == [
      [3, 2, 0],
      [1, 4, 0],
      [0, 0, 0],
  ]
  assert aggregate.macro_mask(macro)[:, :3].tolist() == [
      [True, True, False],
      [True, True, False],
      [False, False, False],
  ]
  offset, length = aggregate.places(macro)
  assert offset.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0], [0] * 6]
  assert length.tolist() == [[3, 3, 3, 2, 2, 1], [1, 4, 4, 4, 4, 1], [1] * 6]
  assert aggregate.ends(macro).astype(int).tolist() == [
      [0, 0, 1, 0, 1, 0],
      [1, 0, 0, 0, 1, 0],
      [0, 0, 0, 0, 0, 0],
  ]


def test_statistics_by_hand():
  # Lengths 1, 2, 3, 4 in two responses: mean 10/4; p95 at 0.95 * 3 = 2.85
  # in sorted order, 3 + 0.85.
  got = jax.jit(aggregate.statistics)(_macro())
  assert {k: pytest.approx(float(v)) for k, v in got.items()} == {
      'length_mean': 2.5,
      'length_p95': 3.85,
      'per_response': 2.0,
  }


def test_statistics_of_a_batch_without_tokens_are_zero():
  got = aggregate.statistics(_macro(mask=np.zeros_like(MASK)))
  assert set(map(float, got.values())) == {0.0}
