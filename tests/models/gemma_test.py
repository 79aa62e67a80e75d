"""Tests of `models.gemma`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ma_rlhf_jax import masking
from ma_rlhf_jax.models import gemma
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.structs import Array, Params
from tests.models.drawn import TINY, draw, left_padded, plain_gemma

PARAMS = draw('policy', TINY, seed=0)
_LENGTHS = [9, 4, 6]
_states = jax.jit(gemma.hidden_states, static_argnums=0)


def _loss(config: GemmaConfig, params: Params, tokens: Array, mask: Array):
  """A sum over the states of real tokens, all weighted differently."""
  hidden = gemma.hidden_states(config, params, tokens, mask)
  weights_D = jnp.cos(jnp.arange(config.embed_dim, dtype=jnp.float32))
  return jnp.sum(jnp.where(mask[..., None], jnp.sin(hidden), 0) @ weights_D)


_value_and_grad = jax.jit(
    jax.value_and_grad(_loss, argnums=1), static_argnums=0
)


def test_equals_a_plain_loop() -> None:
  tokens, mask = left_padded(_LENGTHS, 9)
  hidden = _states(TINY, PARAMS, tokens, mask)
  for row, length in enumerate(_LENGTHS):
    want = plain_gemma(TINY, PARAMS, tokens[row, -length:])
    np.testing.assert_allclose(hidden[row, -length:], want, atol=2e-5)


def test_padding_side_amount_and_content_do_not_matter() -> None:
  tokens, mask = left_padded(_LENGTHS, 9)
  hidden = _states(TINY, PARAMS, tokens, mask)
  moved, moved_mask = np.full((3, 9), 7, np.int32), np.zeros((3, 9), bool)
  for row, length in enumerate(_LENGTHS):
    start = (9 - length) // 2  # padding on both sides now
    moved[row, start : start + length] = tokens[row, -length:]
    moved_mask[row, start : start + length] = True
  out = _states(TINY, PARAMS, moved, moved_mask)
  np.testing.assert_allclose(out[moved_mask], hidden[mask], atol=1e-5)


def test_permuted_rows_permute_the_result() -> None:
  tokens, mask = left_padded(_LENGTHS, 9)
  hidden = _states(TINY, PARAMS, tokens, mask)
  order = np.array([2, 0, 1])
  out = _states(TINY, PARAMS, tokens[order], mask[order])
  np.testing.assert_allclose(out[mask[order]], hidden[order][mask[order]])


def test_later_tokens_do_not_matter() -> None:
  tokens, mask = left_padded([9, 9, 9], 9)
  changed = tokens.copy()
  changed[:, 6:] = 11
  out = _states(TINY, PARAMS, changed, mask)
  hidden = _states(TINY, PARAMS, tokens, mask)
  np.testing.assert_array_equal(out[:, :6], hidden[:, :6])
  assert (jnp.abs(out[:, 6:] - hidden[:, 6:]).max(-1) > 0.01).all()


def test_a_row_of_padding_gives_no_nan() -> None:
  tokens, mask = left_padded([9, 0, 6], 9)
  assert np.isfinite(_states(TINY, PARAMS, tokens, mask)).all()
  value, grads = _value_and_grad(TINY, PARAMS, tokens, mask)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_decoding_from_a_cache_equals_the_whole_row() -> None:
  tokens, mask = left_padded(_LENGTHS, 9)
  whole = _states(TINY, PARAMS, tokens, mask)
  prompt, slots = 5, 11  # two slots stay empty
  apply = jax.jit(
      lambda *args: gemma.Gemma(TINY).apply({'params': PARAMS}, *args)
  )
  real = np.pad(mask, [(0, 0), (0, slots - 9)])
  attend = np.tril(np.ones((9, slots), bool))[None] & real[:, None]
  positions = np.asarray(masking.positions(mask))
  hidden, cache = apply(
      tokens[:, :prompt],
      positions[:, :prompt],
      attend[:, :prompt],
      gemma.Cache.empty(TINY, 3, slots),
      0,
  )
  found = [hidden]
  for slot in range(prompt, 9):
    at = slice(slot, slot + 1)
    hidden, cache = apply(
        tokens[:, at], positions[:, at], attend[:, at], cache, slot
    )
    found.append(hidden)
  found = np.concatenate(found, 1)
  np.testing.assert_allclose(found[mask], whole[mask], atol=1e-5)
  assert cache.keys_XBSKH.shape == (3, 3, 11, 2, 10)
  assert not cache.keys_XBSKH[:, :, 9:].any()
  assert cache.values_XBSKH[:, :, 8].any()


def test_remat_changes_no_value_and_no_gradient() -> None:
  tokens, mask = left_padded(_LENGTHS, 9)
  kept = dataclasses.replace(TINY, remat=False)
  value, grads = _value_and_grad(TINY, PARAMS, tokens, mask)
  kept_value, kept_grads = _value_and_grad(kept, PARAMS, tokens, mask)
  np.testing.assert_allclose(value, kept_value, rtol=1e-5)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
      grads,
      kept_grads,
  )
  assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))
  program = lambda config: str(
      jax.make_jaxpr(_loss, static_argnums=0)(config, PARAMS, tokens, mask)
  )
  assert 'remat' in program(TINY) and 'remat' not in program(kept)


def test_padding_gets_no_gradient() -> None:
  tokens, mask = left_padded(_LENGTHS, 9)
  grad = _value_and_grad(TINY, PARAMS, tokens, mask)[1]['embedding']
  used = np.unique(tokens[mask])
  assert 0 not in used
  assert not grad[0].any()  # the pad id
  assert (jnp.abs(grad[used]).max(-1) > 1e-4).all()


def test_bfloat16_runs_close_to_float32() -> None:
  tokens, mask = left_padded(_LENGTHS, 9)
  half = dataclasses.replace(TINY, dtype='bfloat16', param_dtype='bfloat16')
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  hidden = _states(half, params, tokens, mask)
  assert hidden.dtype == jnp.bfloat16
  assert gemma.head_logits(hidden, params['embedding']).dtype == jnp.float32
  exact = _states(TINY, PARAMS, tokens, mask)
  error = jnp.abs(hidden.astype(jnp.float32) - exact)[mask]
  # bfloat16 has 8 bits: a few parts in 256 of the spread of the states.
  assert 1e-4 < error.mean() / exact[mask].std() < 0.05


def test_embedding_factor_is_rounded_to_the_compute_dtype() -> None:
  # Layers of zeros and an epsilon of 2 ** 20: the states are x / 2 ** 10.
  config = dataclasses.replace(TINY, dtype='bfloat16', norm_eps=2.0**20)
  params = jax.tree.map(jnp.zeros_like, PARAMS)
  params['embedding'] = params['embedding'].at[5].set(1.0234375)
  tokens = np.full((3, 9), 5, np.int32)
  hidden = _states(config, params, tokens, np.ones((3, 9), bool))
  # sqrt(24) = 4.89898 is 4.90625 in bfloat16; 1.0234375 * 4.90625 = 5.02124
  # rounds to 5.03125, but 1.0234375 * 4.89898 = 5.01380 would round to 5.
  np.testing.assert_array_equal(hidden.astype(jnp.float32) * 1024, 5.03125)


def test_head_logits_by_hand() -> None:
  hidden = jnp.array([[1.0, 2.0], [0.5, -1.0]])
  embedding = jnp.array([[3.0, 4.0], [5.0, 6.0], [-1.0, 0.25]])
  logits = gemma.head_logits(hidden, embedding)
  # 3 + 8, 5 + 12, -1 + .5; 1.5 - 4, 2.5 - 6, -.5 - .25
  np.testing.assert_allclose(logits, [[11.0, 17.0, -0.5], [-2.5, -3.5, -0.75]])


def test_cache_write_touches_one_layer_and_its_slots() -> None:
  cache = gemma.Cache.empty(TINY, batch=2, slots=4)
  ones = jnp.ones((2, 2, 2, 10))
  cache = cache.write(1, 1, ones, 2 * ones)
  keys, values = cache.layer(1)
  np.testing.assert_array_equal(keys[1, :, 0, 0], [0, 1, 1, 0])
  np.testing.assert_array_equal(values[0, :, 1, 9], [0, 2, 2, 0])
  assert not cache.keys_XBSKH[jnp.array([0, 2])].any()
