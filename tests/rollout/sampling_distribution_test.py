"""20,000 draws for each setting of the sampler against exact probabilities.

The keys are those of rollouts: of rows, folded with the token's number. A
sampler that is a little wrong must fail the same test.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ma_rlhf_jax.rollout import sampling

_VOCAB, _TOKENS = 200, 10
_PROMPTS, _SAMPLES = 100, 20  # times 10 tokens: 20,000 draws
_ALPHA = 1e-4
_MIN_EXPECTED = 5.0  # draws in a cell; smaller ones are put together

# Different everywhere, so that top-k has one answer.
LOGITS = np.random.default_rng(3).normal(size=_VOCAB).astype(np.float32)


@pytest.fixture(autouse=True, scope='module')
def _small_blocks():
  """A hundred blocks, as a large vocabulary has many."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampling, '_BLOCK', 2)
    yield


Sampler = Callable[..., tuple[jax.Array, ...]]


class How(NamedTuple):
  """Settings of the sampler; see `sampling.sample`."""

  temperature: float
  top_k: int = 0
  top_p: float = 1.0


SETTINGS = [
    How(1.0),
    How(0.7),
    How(1.4),
    How(1.0, top_k=50),
    How(1.0, top_p=0.9),
    How(0.7, top_k=50),
    How(1.3, top_p=0.8),
    How(1.0, top_k=50, top_p=0.9),
    How(0.8, top_k=50, top_p=0.95),
]


def _exact(how: How) -> np.ndarray:
  """float64 [V]: probabilities after temperature, top-k, then top-p."""
  weights = [math.exp(float(x) / how.temperature) for x in LOGITS]
  order = sorted(range(_VOCAB), key=lambda v: -weights[v])
  order = order[: how.top_k or _VOCAB]
  total = math.fsum(weights[v] for v in order)
  kept, mass = [], 0.0
  for v in order:
    # Far from the edge, so that rounding in float32 decides nothing.
    assert how.top_p == 1 or abs(mass - how.top_p) > 1e-4
    if mass >= how.top_p:
      break
    kept.append(v)
    mass += weights[v] / total
  total = math.fsum(weights[v] for v in kept)
  probs = np.zeros(_VOCAB)
  for v in kept:
    probs[v] = weights[v] / total
  return probs


def _draw_rows(
    keys: jax.Array, how: How, sampler: Sampler
) -> tuple[jax.Array, jax.Array]:
  # Under vmap the one row of logits is filtered once for all keys.
  row_1V = jnp.asarray(LOGITS)[None]
  one = lambda key: sampler(row_1V, key[None], **how._asdict())
  tokens_B1, logprobs_B1, _ = jax.vmap(one)(keys)
  return tokens_B1[:, 0], logprobs_B1[:, 0]


_draw_batch = jax.jit(_draw_rows, static_argnums=(1, 2))
_fold = jax.jit(jax.vmap(jax.random.fold_in, (0, None)))


@functools.cache
def _draw(how: How, sampler: Sampler) -> tuple[np.ndarray, np.ndarray]:
  """20,000 tokens and their log-probs."""
  prompts, samples = np.divmod(np.arange(_PROMPTS * _SAMPLES), _SAMPLES)
  keys = sampling.row_keys(jax.random.key(0), 0, prompts, samples)
  parts = [_draw_batch(_fold(keys, t), how, sampler) for t in range(_TOKENS)]
  tokens, logprobs = (np.concatenate(x) for x in zip(*parts, strict=True))
  return tokens, logprobs


def _chi_square(found: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
  """The statistic and its degrees of freedom, small cells pooled."""
  order = np.argsort(expected)
  found, expected = found[order], expected[order]
  pooled = int((expected < _MIN_EXPECTED).sum())
  while 0 < pooled and expected[:pooled].sum() < _MIN_EXPECTED:
    pooled += 1
  if pooled:
    found, expected = (
        np.append(x[pooled:], x[:pooled].sum()) for x in (found, expected)
    )
  return float(((found - expected) ** 2 / expected).sum()), len(found) - 1


def _fault(
    how: How, drawn_with: How, sampler: Sampler = sampling.sample
) -> str:
  """What is wrong with draws made for `how`; '' = nothing."""
  tokens, logprobs = _draw(drawn_with, sampler)
  probs = _exact(how)
  assert tokens.shape == (20_000,)
  if not (probs[tokens] > 0).all():
    return 'outside the support'
  found = np.bincount(tokens, minlength=_VOCAB)
  statistic, freedom = _chi_square(found, len(tokens) * probs)
  assert freedom > 20  # or the test would see little
  if statistic > scipy.stats.chi2.ppf(1 - _ALPHA, freedom):
    return 'wrong shares'
  if np.abs(logprobs - np.log(probs[tokens])).max() > 1e-5:
    return 'wrong log-probs'
  return ''


def test_the_exact_probabilities_by_hand() -> None:
  plain = _exact(How(1.0))
  assert plain.sum() == pytest.approx(1, abs=1e-12)
  a, b = np.argsort(LOGITS)[[0, -1]]
  ratio = math.exp(float(LOGITS[b]) - float(LOGITS[a]))
  assert plain[b] / plain[a] == pytest.approx(ratio)
  assert len(set(LOGITS.tolist())) == _VOCAB
  assert (_exact(How(1.0, top_k=50)) > 0).sum() == 50
  # Top-k 2 leaves two tokens, of which one reaches the mass.
  assert _exact(How(1.0, top_k=2, top_p=0.5)).max() == 1


def test_the_statistic_by_hand() -> None:
  # The last would hold 4, too few, and so joins the next: 25/50 + 0 + 25/10.
  found, expected = np.array([45, 3, 40, 12]), np.array([50.0, 6, 40, 4])
  assert _chi_square(found, expected) == (pytest.approx(3.0), 2)
  # 3 + 3 are enough for a cell of their own: 25/50 + 0 + 4/6 and 16/6.
  found, expected = np.array([45, 40, 4, 0, 6]), np.array([50.0, 40, 3, 3, 6])
  assert _chi_square(found, expected) == (pytest.approx(0.5 + 4 / 6), 3)


@pytest.mark.parametrize('how', SETTINGS, ids=str)
def test_draws_follow_the_exact_distribution(how: How) -> None:
  assert _fault(how, how) == ''


@pytest.mark.parametrize(
    ('how', 'drawn_with', 'fault'),
    [
        (How(1.0, top_k=50), How(1.0, top_k=49), 'wrong shares'),
        (How(1.0, top_k=49), How(1.0, top_k=50), 'outside the support'),
        (How(1.1), How(1.0), 'wrong shares'),
        (How(0.8, top_k=50), How(0.7, top_k=50), 'wrong shares'),
        (How(1.0, top_p=0.87), How(1.0, top_p=0.9), 'outside the support'),
        (How(1.3, top_p=0.85), How(1.3, top_p=0.8), 'wrong shares'),
    ],
    ids=str,
)
def test_a_wrong_sampler_is_found(
    how: How, drawn_with: How, fault: str
) -> None:
  assert _fault(how, drawn_with) == fault


def test_top_p_before_top_k_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
  largest, nucleus = sampling.largest, sampling.nucleus

  def swapped(x_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    values, ids = largest(x_BV, x_BV.shape[-1])
    inside = nucleus(values, 0.9)
    return jnp.where(inside, values, -jnp.inf)[:, :k], ids[:, :k]

  monkeypatch.setattr(sampling, 'largest', swapped)
  monkeypatch.setattr(sampling, 'nucleus', lambda x_BC, _: x_BC > -jnp.inf)
  how = How(1.0, top_k=50, top_p=0.9)
  anew = lambda *args, **settings: sampling.sample(*args, **settings)
  assert _fault(how, how, anew) == 'outside the support'
