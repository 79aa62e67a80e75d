"""Tests of `models.gemma`."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.models import gemma, vocabulary
from ma_rlhf_jax.models.cache import Cache
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.planning import flops
from ma_rlhf_jax.structs import Params
from tests import tolerance
from tests.models.drawn import (
    LENGTHS,
    ONE_KV_HEAD,
    TINY,
    TINY_2,
    draw,
    gradient_rounding,
    left_padded,
    loss,
    plain_gemma,
    rounding,
    states,
    value_and_grad,
)

PARAMS = draw('policy', TINY, seed=0)
TOKENS, MASK = left_padded(LENGTHS, 9)


def _states(tokens: np.ndarray = TOKENS, mask: np.ndarray = MASK) -> np.ndarray:
  return np.asarray(states(TINY, PARAMS, tokens, mask))


def _value_and_grads(
    remat: str = 'full', unroll: int = 1
) -> tuple[float, Params]:
  config = dataclasses.replace(ONE_KV_HEAD, remat=remat, unroll=unroll)
  params = draw('policy', config, seed=0)
  value, grads = value_and_grad(config, params, TOKENS, MASK)
  return float(value), jax.tree.map(np.asarray, grads)


@pytest.mark.parametrize('config', [TINY, TINY_2], ids=['gemma', 'gemma2'])
def test_equals_a_plain_loop(config: GemmaConfig) -> None:
  assert config is TINY or config.sliding_window < max(LENGTHS) - 2
  params = draw('policy', config, seed=0)
  hidden = np.asarray(states(config, params, TOKENS, MASK))
  bound = rounding(config, params, TOKENS, MASK)
  assert bound < 1e-3  # hidden states are about 1
  for row, length in enumerate(LENGTHS):
    want = plain_gemma(config, params, TOKENS[row, 9 - length :])
    np.testing.assert_allclose(
        hidden[row, 9 - length :], want, rtol=0, atol=bound
    )


def test_padding_side_amount_and_content_do_not_matter() -> None:
  moved, moved_mask = np.full((8, 9), 7, np.int32), np.zeros((8, 9), bool)
  for row, length in enumerate(LENGTHS):
    start = (9 - length) // 2  # padding on both sides now
    moved[row, start : start + length] = TOKENS[row, 9 - length :]
    moved_mask[row, start : start + length] = True
  out = _states(moved, moved_mask)
  np.testing.assert_allclose(
      out[moved_mask],
      _states()[MASK],
      rtol=0,
      atol=rounding(TINY, PARAMS, TOKENS, MASK),
  )


def test_permuted_rows_permute_the_result() -> None:
  order = np.array([2, 0, 1, 7, 4, 6, 5, 3])
  out = _states(TOKENS[order], MASK[order])
  np.testing.assert_allclose(
      out[MASK[order]],
      _states()[order][MASK[order]],
      rtol=0,
      atol=rounding(TINY, PARAMS, TOKENS, MASK),
  )


def test_later_tokens_do_not_matter() -> None:
  tokens, mask = left_padded([9] * 8, 9)
  changed = tokens.copy()
  changed[:, 6:] = 11
  out, hidden = _states(changed, mask), _states(tokens, mask)
  np.testing.assert_array_equal(out[:, :6], hidden[:, :6])
  assert (np.abs(out[:, 6:] - hidden[:, 6:]).max(-1) > 0.01).all()


def test_a_row_of_padding_gives_no_nan() -> None:
  assert not MASK[4].any()
  assert np.isfinite(_states()).all()
  value, grads = _value_and_grads()
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_decoding_from_a_cache_equals_the_whole_row() -> None:
  tokens, mask = TOKENS[:3], MASK[:3]
  whole = _states()[:3]
  slots, size = 11, 3  # two slots stay empty; three tokens at a time
  apply = jax.jit(
      lambda *args: gemma.Gemma(TINY).apply({'params': PARAMS}, *args)
  )
  real = np.pad(mask, [(0, 0), (0, slots - 9)])
  attend = np.tril(np.ones((9, slots), bool))[None] & real[:, None]
  positions = np.asarray(masking.positions(mask))
  cache, found = Cache.empty(TINY, 3, slots), []
  for slot in range(0, 9, size):
    at = slice(slot, slot + size)
    hidden, cache = apply(
        tokens[:, at], positions[:, at], attend[:, at], cache, slot
    )
    found.append(hidden)
  found = np.concatenate(found, 1)
  bound = rounding(TINY, PARAMS, tokens, mask)
  np.testing.assert_allclose(found[mask], whole[mask], rtol=0, atol=bound)
  assert cache.keys_XBSKH.shape == (3, 3, 11, 2, 10)
  assert not np.asarray(cache.keys_XBSKH)[:, :, 9:].any()
  assert np.asarray(cache.values_XBSKH)[:, :, 8].any()


@pytest.mark.parametrize(
    ('remat', 'unroll'),
    [('dots', 1), ('attention', 1), ('none', 1), ('full', 2), ('none', 0)],
)
def test_remat_and_loops_change_no_value_and_no_gradient(
    remat: str, unroll: int
) -> None:
  value, grads = _value_and_grads()
  params = draw('policy', ONE_KV_HEAD, seed=0)
  bounds = gradient_rounding(ONE_KV_HEAD, params, TOKENS, MASK)
  kept = _value_and_grads(remat, unroll)
  tolerance.assert_close((value, grads), kept, bounds)
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))


def test_layers_go_round_in_turns_or_one_after_the_other() -> None:
  def loops(unroll: int) -> tuple[int, list[str]]:
    """Loops that run, and layers in a turn of each that is written."""
    config = dataclasses.replace(TINY, num_layers=4, unroll=unroll)
    params = draw('policy', config, seed=0)
    traced = jax.jit(states, static_argnums=0).trace(
        config, params, TOKENS, MASK
    )
    turns = re.findall(r'unroll=(\d+)', str(traced.jaxpr))
    text = traced.lower().compile().as_text()
    return len(re.findall(r' while\(', text)), turns

  assert loops(1) == (1, ['1'])
  assert loops(2) == (1, ['2'])
  assert loops(9) == (0, ['4'])
  assert loops(0) == (0, [])


@pytest.mark.parametrize('config', [TINY, TINY_2], ids=['gemma', 'gemma2'])
@pytest.mark.parametrize('remat', ['full', 'dots', 'none'])
def test_the_last_columns_cost_less_where_layers_are_not_in_a_loop(
    config: GemmaConfig, remat: str
) -> None:
  ends, rows = 4, (TOKENS, MASK)
  straight = dataclasses.replace(config, unroll=0, remat=remat)
  params = draw('policy', config, seed=0)

  def cost(config: GemmaConfig, params: Params, ends: int) -> jax.Array:
    states, _ = gemma.hidden_and_head(config, params, *rows, ends)
    assert states.shape[1] == (ends or TOKENS.shape[1])
    return jnp.sum(jnp.where(MASK[:, -4:, None], jnp.sin(states[:, -4:]), 0))

  grads = jax.jit(jax.grad(cost, 1), static_argnums=(0, 2))
  want = grads(config, params, 0)
  bounds = tolerance.of_sums(lambda p: grads(config, p, 0), (params,), 72)
  for got in grads(config, params, ends), grads(straight, params, ends):
    tolerance.assert_close(got, want, bounds)
  count = lambda ends: flops.count(
      jax.make_jaxpr(lambda p: cost(straight, p, ends))(params)
  )
  d, f, heads = config.embed_dim, config.mlp_dim, config.num_heads
  token = 2 * (d * heads * config.head_dim + 3 * d * f)
  batch, length = TOKENS.shape
  assert count(0) - count(ends) == batch * (length - ends) * token


def test_remat_keeps_what_it_names() -> None:
  def kept(remat: str) -> set[tuple[int, ...]]:
    """Shapes that the forward pass leaves to the backward pass, by layer."""
    config = dataclasses.replace(TINY, remat=remat)
    cost = lambda params: loss(config, params, TOKENS, MASK)
    backward = jax.eval_shape(lambda p: jax.vjp(cost, p)[1], PARAMS)
    shapes = {x.shape for x in jax.tree.leaves(backward)}
    return {s[1:] for s in shapes if s[:1] == (TINY.num_layers,) and s[3:]}

  b, length = TOKENS.shape
  weights = {x.shape[1:] for x in jax.tree.leaves(PARAMS['layers'])}
  inputs, mixed = (b, length, TINY.embed_dim), (b, length, 4, 10)
  mlp = (b, length, TINY.mlp_dim)
  full = kept('full')
  assert inputs in full and full - weights == {inputs}
  assert kept('attention') - full == {mixed}
  dots = kept('dots')
  assert mixed in dots and mlp in dots  # queries have the shape of `mixed`
  assert (b, 2, 2, length, length) in kept('none') - dots


def test_padding_gets_no_gradient() -> None:
  grad = _value_and_grads()[1]['embedding']
  used = np.unique(TOKENS[MASK])
  assert 0 not in used
  assert not grad[0].any()  # the pad id
  assert (np.abs(grad[used]).max(-1) > 1e-4).all()


def test_bfloat16_runs_close_to_float32() -> None:
  half = dataclasses.replace(TINY, dtype='bfloat16', param_dtype='bfloat16')
  params = draw('policy', half, seed=0)
  hidden = states(half, params, TOKENS, MASK)
  assert hidden.dtype == jnp.bfloat16
  head = functools.partial(vocabulary.head_logits, softcap=30.0)
  logits = jax.eval_shape(head, hidden, params['embedding'])
  assert logits.dtype == jnp.float32
  exact = _states()[MASK]
  error = np.abs(np.asarray(hidden).astype(np.float32)[MASK] - exact)
  # bfloat16 has 8 bits: a few parts in 256 of the spread of the states.
  assert 1e-4 < error.mean() / exact.std() < 0.05


def test_embedding_factor_is_rounded_to_the_compute_dtype() -> None:
  # Layers of zeros and an epsilon of 2 ** 20: the states are x / 2 ** 10.
  config = dataclasses.replace(TINY, dtype='bfloat16', norm_eps=2.0**20)
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), PARAMS)
  params['embedding'][5] = 1.0234375
  tokens = np.full((1, 2), 5, np.int32)
  hidden = states(config, params, tokens, np.ones((1, 2), bool))
  # sqrt(24) = 4.89898 is 4.90625 in bfloat16; 1.0234375 * 4.90625 = 5.02124
  # rounds to 5.03125, but 1.0234375 * 4.89898 = 5.01380 would round to 5.
  found = np.asarray(hidden).astype(np.float32)
  np.testing.assert_array_equal(found * 1024, 5.03125)
