"""Tests of `models.attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.models.attention import attend, rotate


def _normal(*shape: int, seed: int = 0) -> jax.Array:
  drawn = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(drawn, jnp.float32)


def test_rotate_by_hand() -> None:
  x_11NH = jnp.array([[[[1.0, 2.0, 3.0, 4.0]]]])
  out = rotate(x_11NH, jnp.array([[1]]), theta=100.0)
  # Angles 1 and 100 ** (-2 / 4) = 0.1; pairs (1, 3) and (2, 4).
  # cos 1 - 3 sin 1, 2 cos .1 - 4 sin .1, 3 cos 1 + sin 1, 4 cos .1 + 2 sin .1
  np.testing.assert_allclose(
      out[0, 0, 0], [-1.984111, 1.590675, 2.462378, 4.179684], atol=2e-6
  )


def test_position_zero_is_not_rotated() -> None:
  x = _normal(2, 3, 4, 6)
  out = rotate(x, jnp.zeros((2, 3), jnp.int32), theta=10.0)
  np.testing.assert_array_equal(out, x)


def test_only_the_distance_of_positions_matters() -> None:
  q, k = _normal(1, 1, 1, 8), _normal(1, 1, 1, 8, seed=1)
  at = lambda x, position: rotate(x, jnp.array([[position]]), theta=50.0)
  near = jnp.sum(at(q, 5) * at(k, 2))
  np.testing.assert_allclose(jnp.sum(at(q, 105) * at(k, 102)), near, atol=1e-4)
  assert abs(jnp.sum(at(q, 5) * at(k, 3)) - near) > 0.05


def test_rotation_of_bfloat16_is_rounded_once() -> None:
  x = _normal(1, 2, 3, 8).astype(jnp.bfloat16)
  positions = jnp.array([[1000, 7001]])  # bfloat16 would hold 7008
  out = rotate(x, positions, theta=10_000.0)
  exact = rotate(x.astype(jnp.float32), positions, theta=10_000.0)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_float64_stays() -> None:
  with jax.enable_x64(True):
    x = jnp.ones((1, 1, 1, 4), jnp.float64)
    ones = jnp.ones((1, 1, 1), bool)
    assert rotate(x, jnp.array([[3]]), theta=10.0).dtype == jnp.float64
    assert attend(x, x, x, ones, scale=1.0).dtype == jnp.float64


def test_attend_by_hand() -> None:
  query = jnp.array([[[[1.0, 2.0]]]])
  keys = jnp.array([[[[2 * np.log(4.0), 0.0]], [[0.0, 0.0]], [[9.0, 9.0]]]])
  values = jnp.array([[[[10.0, -5.0]], [[20.0, 5.0]], [[1e9, 1e9]]]])
  mask = jnp.array([[[True, True, False]]])
  out = attend(query, keys, values, mask, scale=0.5)
  # Scores ln 4 and 0: weights 4/5 and 1/5. 8 + 4 = 12, -4 + 1 = -3.
  np.testing.assert_allclose(out[0, 0, 0], [12.0, -3.0], rtol=1e-6)


@pytest.mark.parametrize('kv_heads', [1, 2, 6])
def test_groups_of_query_heads_share_a_key_head(kv_heads: int) -> None:
  b, length, slots, heads, size = 2, 3, 5, 6, 4
  q, k = _normal(b, length, heads, size), _normal(b, slots, kv_heads, size)
  v = _normal(b, slots, kv_heads, size, seed=1)
  mask = np.random.default_rng(2).random((b, length, slots)) < 0.6
  mask[..., 0] = True
  out = attend(q, k, v, jnp.asarray(mask), scale=0.7)
  for i, t, n in np.ndindex(b, length, heads):
    kv = n // (heads // kv_heads)
    seen = np.flatnonzero(mask[i, t])
    weights = np.exp(0.7 * np.asarray(k[i, seen, kv] @ q[i, t, n]))
    want = weights @ np.asarray(v[i, seen, kv]) / weights.sum()
    np.testing.assert_allclose(out[i, t, n], want, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_gets_the_mean() -> None:
  q, k, v = _normal(1, 2, 2, 4), _normal(1, 3, 1, 4), _normal(1, 3, 1, 4)
  mask = jnp.array([[[False] * 3, [True] * 3]])
  out = attend(q, k, v, mask, scale=0.5)
  np.testing.assert_allclose(out[0, 0, 1], v[0, :, 0].mean(0), rtol=1e-5)


def test_masked_keys_do_not_matter_and_get_no_gradient() -> None:
  q, k, v = _normal(1, 2, 2, 4), _normal(1, 3, 1, 4), _normal(1, 3, 1, 4)
  mask = jnp.array([[[True, False, True], [False, False, True]]])
  loss = jax.jit(lambda k, v: jnp.sum(attend(q, k, v, mask, scale=0.5) ** 2))
  nan_k = k.at[:, 1].set(jnp.nan)
  np.testing.assert_array_equal(loss(nan_k, v), loss(k, v))
  for grad in jax.jit(jax.grad(loss, argnums=(0, 1)))(k, v):
    assert np.isfinite(grad).all()
    assert not grad[:, 1].any()
    assert grad[:, 0].any()


def test_plain_jit_and_permuted_rows_agree() -> None:
  q, k, v = _normal(3, 2, 4, 6), _normal(3, 5, 2, 6), _normal(3, 5, 2, 6)
  mask = jnp.asarray(np.random.default_rng(0).random((3, 2, 5)) < 0.5)
  out = attend(q, k, v, mask, scale=0.3)
  jitted = jax.jit(lambda *args: attend(*args, scale=0.3))
  np.testing.assert_allclose(jitted(q, k, v, mask), out, atol=1e-6)
  order = np.array([2, 0, 1])
  permuted = jitted(q[order], k[order], v[order], mask[order])
  np.testing.assert_allclose(permuted, out[order], atol=1e-6)
