"""Slots are written where they belong; 8 bits hold nearly the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.models import presets
from ma_rlhf_jax.models.cache import Cache, quantise
from ma_rlhf_jax.structs import Array

TINY = presets.GemmaConfig(20, 3, 12, 16, 4, 2, 10)


def test_cache_write_touches_one_layer_and_its_slots() -> None:
  @jax.jit
  def write(ones: Array) -> tuple[Cache, tuple[Array, Array]]:
    cache = Cache.empty(TINY, batch=2, slots=4)
    cache = cache.write(1, 1, ones, 2 * ones)
    return cache, cache.layer(1)[:2]

  cache, (keys, values) = write(np.ones((2, 2, 2, 10), np.float32))
  np.testing.assert_array_equal(np.asarray(keys)[1, :, 0, 0], [0, 1, 1, 0])
  np.testing.assert_array_equal(np.asarray(values)[0, :, 1, 9], [0, 2, 2, 0])
  assert not np.asarray(cache.keys_XBSKH)[[0, 2]].any()


def test_the_cache_is_written_where_plain_integers_are_wide() -> None:
  with jax.enable_x64(True):
    cache = Cache.empty(TINY, batch=1, slots=3)
    shape = (1, 1, TINY.num_kv_heads, TINY.head_dim)
    ones = jnp.ones(shape, cache.keys_XBSKH.dtype)
    written = cache.write(jnp.int32(1), 2, ones, 2 * ones)
  assert int(written.keys_XBSKH.sum()) == ones.size
  assert bool((written.values_XBSKH[1, 0, 2] == 2).all())


def test_quantised_numbers_are_within_half_a_step() -> None:
  x = np.random.default_rng(0).normal(size=(3, 5, 2, 16)).astype(np.float32)
  x[0, 0] = 0
  small, scales = quantise(x)
  assert small.dtype == jnp.int8 and scales.shape == (3, 5, 2)
  error = np.abs(np.asarray(small) * np.asarray(scales)[..., None] - x)
  assert (error <= np.abs(x).max(-1, keepdims=True) / 127 * 0.5001).all()


@pytest.mark.parametrize('unrolled', [False, True])
@pytest.mark.parametrize('int8', [False, True])
def test_a_grown_cache_holds_what_it_held(unrolled: bool, int8: bool) -> None:
  config = dataclasses.replace(TINY, unrolled=unrolled)
  draw = np.random.default_rng(0).normal
  keys, values = draw(size=(2, 2, 3, 2, 10)).astype(np.float32)
  cache = Cache.empty(config, batch=2, slots=3, int8=int8)
  cache = cache.write(1, 0, jnp.asarray(keys), jnp.asarray(values))
  grown = cache.grown(5)
  assert (cache.slots, grown.slots, grown.num_kv_heads) == (3, 5, 2)
  for before, after in zip(cache.layer(1)[:2], grown.layer(1)[:2], strict=True):
    np.testing.assert_array_equal(after[:, :3], before)
    assert not np.asarray(after[:, 3:]).any()
  scales = cache.layer(1)[2]
  assert set(scales) == (
      {'key_scales_BSK', 'value_scales_BSK'} if int8 else set()
  )
  if int8:
    found = cache.layer(1)[0] * scales['key_scales_BSK'][..., None]
    np.testing.assert_allclose(found, keys, atol=np.abs(keys).max() / 250)
