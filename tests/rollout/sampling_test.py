"""Filters, keys and draws by hand, and against exact probabilities."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.rollout import sampling
from ma_rlhf_jax.structs import Array

# Not normalised: 16 parts.
PARTS = np.array([4.0, 1, 6, 2, 3])
LOGITS = np.log(PARTS).astype(np.float32) + 3
_draw = jax.jit(
    sampling.sample, static_argnames=('temperature', 'top_k', 'top_p')
)


def _keys(count: int, seed: int = 0) -> Array:
  return jax.random.split(jax.random.key(seed), count)


def _sample(
    logits: np.ndarray, count: int, banned: int = -1, **how
) -> tuple[np.ndarray, ...]:
  """`count` draws from one row of logits."""
  how = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0} | how
  rows = np.tile(logits, (count, 1))
  return tuple(
      map(np.asarray, _draw(rows, _keys(count), banned_id=banned, **how))
  )


def _kept(probs: list[float], **how) -> list[int]:
  """Which tokens are kept, of a single row: what 400 draws find."""
  tokens, _, _ = _sample(np.log(np.array(probs, np.float32)), 400, **how)
  return sorted(set(tokens.tolist()))


@pytest.mark.parametrize('vocab', [5, 640, 1000, 4096])
@pytest.mark.parametrize('values', [3, 100_000])  # with many ties, with few
def test_the_largest_are_those_of_top_k(vocab: int, values: int) -> None:
  drawn = np.random.default_rng(vocab).integers(values, size=(6, vocab))
  rows = drawn.astype(np.float32)
  for k in (1, 4, min(50, vocab), vocab):
    found = sampling.largest(rows, k)
    want = jax.lax.top_k(rows, k)
    np.testing.assert_array_equal(found[0], want[0])
    np.testing.assert_array_equal(found[1], want[1])


def test_top_k_by_hand():
  probs = [0.25, 0.0625, 0.375, 0.125, 0.1875]
  assert _kept(probs, top_k=1) == [2]
  assert _kept(probs, top_k=3) == [0, 2, 4]
  for off in (0, 5, 9):
    assert _kept(probs, top_k=off) == [0, 1, 2, 3, 4]


def test_of_ties_with_the_kth_the_first_stays():
  assert _kept([0.2, 0.3, 0.2, 0.2, 0.1], top_k=2) == [0, 1]


def test_the_best_token_is_drawn_where_only_it_is_kept():
  # Where log-probs are compared with a k-th value that the compiler computed
  # anew, it can be below itself: one row in 800 then drew token 0.
  draw = jax.jit(
      lambda logits, keys: sampling.sample(
          logits, keys, temperature=0.8, top_k=1, top_p=1.0
      )[0]
  )
  logits = np.random.default_rng(0).normal(size=(100, 8, 20)) * 0.3
  for number, rows in enumerate(logits.astype(np.float32)):
    found = draw(rows, _keys(8, number))
    assert found.tolist() == rows.argmax(1).tolist()


def test_top_p_by_hand():
  # Sorted: token 2 .375, 0 .25 (.625), 4 .1875 (.8125), 3 .125 (.9375), 1.
  probs = [0.25, 0.0625, 0.375, 0.125, 0.1875]
  assert _kept(probs, top_p=0.3) == [2]
  assert _kept(probs, top_p=0.5) == [0, 2]
  assert _kept(probs, top_p=0.625) == [0, 2]  # reached, not passed
  assert _kept(probs, top_p=0.63) == [0, 2, 4]
  assert _kept(probs, top_p=0.95) == [0, 1, 2, 3, 4]
  assert _kept(probs, top_p=1e-9) == [2]  # the first always


def test_top_p_breaks_ties_towards_the_first_token():
  assert _kept([0.25, 0.25, 0.25, 0.25], top_p=0.5) == [0, 1]


def test_top_p_sees_what_top_k_left():
  # Top-3 keeps .375, .25 and .1875 of .8125: 6/13, 10/13 and 1. Without
  # renormalising .75 would need the third.
  probs = [0.25, 0.0625, 0.375, 0.125, 0.1875]
  assert _kept(probs, top_k=3, top_p=0.75) == [0, 2]
  assert _kept(probs, top_p=0.75) == [0, 2, 4]


def test_kept_sets_are_those_of_each_row():
  rows = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]))
  rows = jnp.repeat(rows, 100, axis=0)
  tokens, _, _ = _draw(rows, _keys(200), temperature=1.0, top_k=0, top_p=0.8)
  assert set(tokens[:100].tolist()) == {0, 1}
  assert set(tokens[100:].tolist()) == {1, 2}


def test_temperature_zero_is_greedy():
  for banned, want in ((-1, 2), (2, 0)):
    tokens, logprobs, mass = _sample(LOGITS, 3, banned, temperature=0.0)
    assert tokens.tolist() == [want] * 3 and tokens.dtype == np.int32
    assert logprobs.tolist() == [0, 0, 0] and mass.tolist() == [1, 1, 1]


# Which tokens can be drawn at temperature 1/2 (parts 16 1 36 4 9 of 66).
@pytest.mark.parametrize(
    'how, banned, kept',
    [
        ({}, -1, [0, 1, 2, 3, 4]),
        ({'top_k': 3}, -1, [0, 2, 4]),
        ({'top_p': 0.7}, -1, [0, 2]),  # 36/66 = .55, 52/66 = .79
        ({}, 2, [0, 1, 3, 4]),
        # Of the 30 parts left: 16/30 = .53, 25/30 = .83.
        ({'top_p': 0.7}, 2, [0, 4]),
        ({'top_k': 2}, 2, [0, 4]),
        ({'top_k': 3, 'top_p': 0.6}, -1, [0, 2]),  # 36/61 = .59, 52/61
    ],
)
def test_logprob_and_kept_mass_by_hand(how, banned, kept):
  parts = PARTS**2
  tokens, logprobs, mass = _sample(LOGITS, 400, banned, temperature=0.5, **how)
  assert set(tokens.tolist()) <= set(kept)
  left = parts[kept].sum()
  # Some twenty roundings of numbers below 5, the log of a sum among them.
  close = functools.partial(
      np.testing.assert_allclose, rtol=0, atol=20 * 5 * 2.0**-24
  )
  close(logprobs, np.log(parts / left)[tokens])
  close(mass, left / 66)


def test_masses_of_blocks_add_up_where_a_token_is_banned():
  logits = np.random.default_rng(3).normal(0, 3, 640).astype(np.float32)
  banned = int(np.argmax(logits))
  p = np.exp(logits.astype(np.float64))
  for how, kept in (({}, 639), ({'top_k': 4}, 4)):
    tokens, logprobs, mass = _sample(logits, 50, banned, **how)
    left = np.sort(np.delete(p, banned))[-kept:].sum()
    assert banned not in tokens
    np.testing.assert_allclose(logprobs, np.log(p[tokens] / left), rtol=1e-4)
    np.testing.assert_allclose(mass, left / p.sum(), rtol=1e-4)


@pytest.mark.parametrize('how', [{}, {'top_p': 0.9}], ids=str)
def test_draws_follow_the_exact_distribution(how):
  # Parts 4 1 6 2 3 of 16; top-p .9 leaves 6 4 3 2 (15/16 >= .9 > 13/16).
  count = 4096
  parts = PARTS.copy()
  if how:
    parts[1] = 0
  expected = count * parts / parts.sum()
  tokens, _, _ = _sample(LOGITS, count, **how)
  found = np.bincount(tokens, minlength=5)
  real = expected > 0
  assert found[~real].sum() == 0
  chi_square = ((found - expected)[real] ** 2 / expected[real]).sum()
  # Three or four degrees of freedom: 18.5 is passed once in a thousand.
  assert chi_square < 18.5


def test_nothing_can_be_drawn_twice_from_one_key_but_the_same():
  logits = np.tile(LOGITS, (6, 1))
  keys = jnp.tile(_keys(1), 6)
  tokens, _, _ = _draw(logits, keys, temperature=1.0, top_k=0, top_p=1.0)
  assert len(set(tokens.tolist())) == 1


@pytest.mark.parametrize('top_p', [1.0, 0.8])
def test_a_row_does_not_see_its_neighbours(top_p: float):
  how = {'temperature': 0.9, 'top_k': 0, 'top_p': top_p}
  logits = np.random.default_rng(0).normal(size=(8, 30)).astype(np.float32)
  keys, order = _keys(8), np.array([5, 2, 7, 0, 1, 6, 4, 3])
  base = _draw(logits, keys, **how)
  moved = _draw(logits[order], keys[order], **how)
  fewer = _draw(logits[:3], keys[:3], **how)
  assert moved[0].tolist() == base[0][order].tolist()
  assert fewer[0].tolist() == base[0][:3].tolist()
  np.testing.assert_allclose(moved[1], base[1][order], rtol=1e-6)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    logits = np.log(PARTS)[None] + 3
    how = {'temperature': 0.5, 'top_k': 3, 'top_p': 0.95}
    tokens, logprobs, mass = sampling.sample(logits, _keys(1), **how)
    assert tokens.dtype == jnp.int32
    assert logprobs.dtype == mass.dtype == jnp.float64
    # 36, 16 and 9 of 66 parts; 52/61 < .95.
    want = np.log(PARTS[tokens[0]] ** 2 / 61)
    np.testing.assert_allclose(logprobs, [want], rtol=0, atol=1e-14)
    np.testing.assert_allclose(mass, [61 / 66], rtol=0, atol=1e-14)


def _bits(step: int, prompt: int, sample: int, seed: int = 0) -> tuple:
  ids = jnp.array([prompt]), jnp.array([sample])
  keys = sampling.row_keys(jax.random.key(seed), step, *ids)
  return tuple(jax.random.key_data(keys)[0].tolist())


def test_row_keys_differ_by_stream_step_prompt_and_sample():
  found = {
      _bits(step, prompt, sample, seed)
      for seed in (0, 1)
      for step in (0, 1, 2)
      for prompt in (0, 1, 2)
      for sample in (0, 1, 2)
  }
  assert len(found) == 2 * 3 * 3 * 3  # also (1, 2) and (2, 1) differ


def test_row_keys_are_a_function_of_the_row_alone():
  ids = jnp.array([7, 3, 7, 5]), jnp.array([0, 0, 1, 2])
  make = jax.jit(functools.partial(sampling.row_keys, jax.random.key(0)))
  bits = jax.random.key_data(make(4, *ids)).tolist()
  want = [_bits(4, *row) for row in ((7, 0), (3, 0), (7, 1), (5, 2))]
  assert list(map(tuple, bits)) == want


def test_a_tiny_temperature_is_nearly_greedy_and_finite():
  tokens, logprobs, mass = _sample(LOGITS, 50, temperature=1e-3)
  assert tokens.tolist() == [2] * 50
  assert np.abs(logprobs).max() < 1e-6 and math.isclose(mass[0], 1)
