"""Tests of `models.attention`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.masking import causal_mask
from ma_rlhf_jax.models import attention, kernels
from ma_rlhf_jax.models.gemma import hidden_states
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.structs import Array
from tests.models.drawn import (
    LENGTHS,
    TINY,
    TINY_2,
    draw,
    left_padded,
    rounding,
    states,
)

rotate = jax.jit(attention.rotate, static_argnames='theta')
attend = jax.jit(attention.attend, static_argnames='scale')


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
  drawn = np.random.default_rng(seed).standard_normal(shape)
  return drawn.astype(np.float32)


def test_rotate_by_hand() -> None:
  x_11NH = np.array([[[[1.0, 2.0, 3.0, 4.0]]]], np.float32)
  out = np.asarray(rotate(x_11NH, np.array([[1]]), theta=100.0))
  # Angles 1 and 100 ** (-2 / 4) = 0.1; pairs (1, 3) and (2, 4).
  cos, sin = np.cos([1, 0.1]), np.sin([1, 0.1])
  want = [*(cos * [1, 2] - sin * [3, 4]), *(cos * [3, 4] + sin * [1, 2])]
  assert want[0] == pytest.approx(-1.984111, abs=1e-6)  # cos 1 - 3 sin 1
  # Some ten roundings of numbers below 5.
  np.testing.assert_allclose(out[0, 0, 0], want, rtol=0, atol=10 * 5 * 2.0**-24)


def test_position_zero_is_not_rotated() -> None:
  x = _normal(2, 3, 4, 6)
  out = rotate(x, np.zeros((2, 3), np.int32), theta=10.0)
  np.testing.assert_array_equal(out, x)


def test_only_the_distance_of_positions_matters() -> None:
  q, k = _normal(1, 1, 1, 8), _normal(1, 1, 1, 8, seed=1)
  at = lambda x, p: np.asarray(rotate(x, np.array([[p]]), theta=50.0))
  near = np.sum(at(q, 5) * at(k, 2))
  np.testing.assert_allclose(np.sum(at(q, 105) * at(k, 102)), near, atol=1e-4)
  assert abs(np.sum(at(q, 5) * at(k, 3)) - near) > 0.05


def test_rotation_of_bfloat16_is_rounded_once() -> None:
  x = _normal(1, 2, 3, 8).astype(jnp.bfloat16)
  positions = np.array([[1000, 7001]])  # bfloat16 would hold 7008
  out = rotate(x, positions, theta=10_000.0)
  exact = rotate(x.astype(np.float32), positions, theta=10_000.0)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, np.asarray(exact).astype(jnp.bfloat16))


def test_float64_stays() -> None:
  with jax.enable_x64(True):
    x = np.full((1, 1, 1, 4), 1 / 3)
    out = rotate(x, np.array([[3]]), theta=10.0)
    mixed = attend(x, x, x, np.ones((1, 1, 1), bool), scale=1.0)
  assert out.dtype == mixed.dtype == np.float64
  # cos 3 - sin 3 and, with 3 / 10 ** .5 = 0.9487, cos .9487 - sin .9487
  want = [-1.1311125046603125 / 3, -0.2298952859398119 / 3]
  np.testing.assert_allclose(out[0, 0, 0, :2], want, rtol=1e-12)
  np.testing.assert_allclose(mixed, x, rtol=1e-15)


def test_attend_by_hand() -> None:
  query = np.array([[[[1.0, 2.0]]]])
  keys = np.array([[[[2 * np.log(4.0), 0.0]], [[0.0, 0.0]], [[9.0, 9.0]]]])
  values = np.array([[[[10.0, -5.0]], [[20.0, 5.0]], [[1e9, 1e9]]]])
  mask = np.array([[[True, True, False]]])
  out = np.asarray(attend(query, keys, values, mask, scale=0.5))
  # Scores ln 4 and 0: weights 4/5 and 1/5. 8 + 4 = 12, -4 + 1 = -3.
  np.testing.assert_allclose(out[0, 0, 0], [12.0, -3.0], rtol=1e-6)


@pytest.mark.parametrize('kv_heads', [1, 2, 6])
def test_groups_of_query_heads_share_a_key_head(kv_heads: int) -> None:
  b, length, slots, heads, size = 2, 3, 5, 6, 4
  q, k = _normal(b, length, heads, size), _normal(b, slots, kv_heads, size)
  v = _normal(b, slots, kv_heads, size, seed=1)
  mask = np.random.default_rng(2).random((b, length, slots)) < 0.6
  mask[..., 0] = True
  out = np.asarray(attend(q, k, v, mask, scale=0.7))
  for i, t, n in np.ndindex(b, length, heads):
    kv = n // (heads // kv_heads)
    seen = np.flatnonzero(mask[i, t])
    weights = np.exp(0.7 * (k[i, seen, kv] @ q[i, t, n]))
    want = weights @ v[i, seen, kv] / weights.sum()
    np.testing.assert_allclose(out[i, t, n], want, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_gets_the_mean() -> None:
  q, k, v = _normal(1, 2, 2, 4), _normal(1, 3, 1, 4), _normal(1, 3, 1, 4)
  mask = np.array([[[False] * 3, [True] * 3]])
  out = np.asarray(attend(q, k, v, mask, scale=0.5))
  np.testing.assert_allclose(out[0, 0, 1], v[0, :, 0].mean(0), rtol=1e-5)


def test_masked_keys_do_not_matter_and_get_no_gradient() -> None:
  q, k, v = _normal(1, 2, 2, 4), _normal(1, 3, 1, 4), _normal(1, 3, 1, 4)
  mask = np.array([[[True, False, True], [False, False, True]]])
  loss = lambda k, v: jnp.sum(attend(q, k, v, mask, scale=0.5) ** 2)
  value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  nan_k = k.copy()
  nan_k[:, 1] = np.nan
  value, grads = value_and_grad(k, v)
  np.testing.assert_array_equal(value_and_grad(nan_k, v)[0], value)
  for grad in map(np.asarray, grads):
    assert np.isfinite(grad).all()
    assert not grad[:, 1].any()
    assert grad[:, 0].any()


def test_plain_jit_and_permuted_rows_agree() -> None:
  q, k, v = _normal(3, 2, 4, 6), _normal(3, 5, 2, 6), _normal(3, 5, 2, 6)
  mask = np.random.default_rng(0).random((3, 2, 5)) < 0.5
  out = attention.attend(*map(jnp.asarray, (q, k, v, mask)), scale=0.3)
  np.testing.assert_allclose(attend(q, k, v, mask, scale=0.3), out, atol=1e-6)
  order = np.array([2, 0, 1])
  permuted = attend(q[order], k[order], v[order], mask[order], scale=0.3)
  np.testing.assert_allclose(permuted, np.asarray(out)[order], atol=1e-6)


def _as_kernel(q: Array, k: Array, v: Array, real: Array, **how) -> Array:
  """A kernel by plain means."""
  mask, window = causal_mask(real), how.pop('window')
  if window:
    mask &= ~jnp.tril(jnp.ones(mask.shape[1:], bool), -window)[None]
  return attention.attend(q, k, v, mask, **how)


@pytest.mark.parametrize('config', [TINY, TINY_2], ids=['gemma', 'gemma2'])
def test_a_kernel_gets_what_the_plain_path_sees(
    config: GemmaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  params = draw('policy', config, seed=0)
  tokens, mask = left_padded(LENGTHS, 9)
  want = np.asarray(states(config, params, tokens, mask))
  bound = rounding(config, params, tokens, mask)
  monkeypatch.setitem(kernels.KERNELS, 'splash', _as_kernel)
  monkeypatch.setattr(kernels, 'chosen', lambda *_: 'splash')
  got = jax.jit(functools.partial(hidden_states, config))(params, tokens, mask)
  np.testing.assert_allclose(
      np.asarray(got)[mask],
      want[mask],
      rtol=0,
      atol=bound,
  )


def test_masks_of_other_shapes_stay_with_plain_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(kernels, 'chosen', lambda *_: 'splash')
  mask = np.ones((2, 1, 9), bool)
  assert attention.Masks.of(TINY, mask, 8) == (mask, None)
  sliding = attention.Masks.of(TINY_2, mask, 8).sliding
  assert sliding[0, 0].tolist() == [False] * 5 + [True] * 4
  rows = attention.Masks.of(TINY_2, mask[:, 0], 0)
  assert rows.full.shape == rows.sliding.shape == (2, 9)
