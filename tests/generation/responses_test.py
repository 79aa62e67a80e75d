"""Responses to many prompts against a plain loop, whatever the batches are."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.generation import batching, responses
from ma_rlhf_jax.generation.responses import Models, Response
from ma_rlhf_jax.models.gemma import hidden_states
from ma_rlhf_jax.models.heads import token_scores
from ma_rlhf_jax.models.vocabulary import head_logits
from ma_rlhf_jax.rollout import decode, sampling
from ma_rlhf_jax.structs import Params
from tests import tiny, tolerance

T = tiny.RESPONSE_LEN
PARAMS, SCALAR = tiny.params('policy', 7), tiny.params('scalar', 9)
SETTINGS = decode.SamplingSettings(
    T, tiny.EOS, tiny.PAD, temperature=0.8, top_k=12
)
PROMPTS = [
    [2, 5, 6, 3],
    [2],
    [2, 9, 3, 4, 5, 6, 7, 8] * 5,  # of the next width
    [2, 5, 6, 3],  # again
    [2, 17],
]
_states = jax.jit(functools.partial(hidden_states, tiny.SHAPE))
_scores = jax.jit(functools.partial(token_scores, tiny.SHAPE))
_sample = jax.jit(
    functools.partial(sampling.sample, temperature=0.8, top_k=12, top_p=1.0)
)


def _models(scored: bool = False, devices: int = 2) -> Models:
  scorer = (tiny.SHAPE, SCALAR) if scored else None
  return Models(tiny.mesh(devices, 1, 1), (tiny.SHAPE, PARAMS), scorer)


def _respond(
    prompts: list[list[int]],
    *,
    settings: decode.SamplingSettings = SETTINGS,
    scored: bool = False,
    seed: int = 5,
    num_samples: int = 1,
    batch_size: int = 4,
) -> list[Response]:
  """All responses, by row and sample."""
  models = _models(scored)
  with jax.set_mesh(models.mesh):
    found = responses.respond(
        models,
        prompts,
        settings,
        num_samples=num_samples,
        seed=seed,
        batch_size=batch_size,
    )
    return sorted(r for batch in found for r in batch)


def _logits(ids: list[int], params: Params = PARAMS) -> np.ndarray:
  """float32 [L, V] after each token, of one row of 56 columns at most."""
  row = np.zeros((1, 56), np.int32)
  row[0, : len(ids)] = ids
  states = _states(params, row, np.arange(56)[None] < len(ids))
  logits = head_logits(states, params['embedding'], softcap=0.0)
  return np.asarray(logits)[0, : len(ids)]


def _plain(prompt: list[int], sample: int, key: int) -> list[int]:
  """One response, token by token without a cache."""
  ids: list[int] = []
  rows = jnp.array([key]), jnp.array([sample])
  (row_key,) = sampling.row_keys(jax.random.key(5), 0, *rows)
  while len(ids) < T and tiny.EOS not in ids:
    key_B = jax.random.fold_in(row_key, len(ids))[None]
    drawn, _, _ = _sample(_logits(prompt + ids)[-1:], key_B)
    ids.append(int(drawn[0]))
  return ids


def _logprob(response: Response, params: Params = PARAMS) -> float:
  """That of the whole response, without temperature and top-k."""
  prompt = PROMPTS[response.row]
  logits = _logits(prompt + response.ids, params).astype(np.float64)
  before = logits[len(prompt) - 1 : -1]
  each = before - np.log(np.exp(before).sum(-1, keepdims=True))
  return sum(each[t, token] for t, token in enumerate(response.ids))


def _logprob_bounds(response: Response) -> list[float]:
  """How far it may be off; the sum over the tokens is rounded at each."""
  (bound,) = tiny.rounding(functools.partial(_logprob, response), PARAMS)
  return [bound + T * 2.0**-24 * abs(_logprob(response))]


def _score(response: Response, params: Params) -> float:
  """That of its last token."""
  ids = PROMPTS[response.row] + response.ids
  row = np.zeros((1, 56), np.int32)
  row[0, : len(ids)] = ids
  mask = np.arange(56)[None] < len(ids)
  return float(_scores(params, row, mask)[0, len(ids) - 1])


@pytest.mark.slow
def test_equals_a_plain_loop():
  found = _respond(PROMPTS, num_samples=2)
  assert [(r.row, r.sample) for r in found] == [
      (row, sample) for row in range(5) for sample in (0, 1)
  ]
  keys = batching.prompt_keys(PROMPTS)
  for response in found:
    want = _plain(PROMPTS[response.row], response.sample, keys[response.row])
    assert response.ids == want
  assert len({tuple(r.ids) for r in found}) > 7


def test_the_logprob_is_that_of_the_model_itself():
  for response in _respond(PROMPTS):
    bounds = _logprob_bounds(response)
    tolerance.assert_close(response.logprob, _logprob(response), bounds)
    assert response.score is None


def test_the_score_is_read_at_the_last_token():
  found = _respond(PROMPTS, scored=True)
  want = lambda params: np.array([_score(r, params) for r in found])
  bounds = tiny.rounding(want, SCALAR)
  scores = np.array([r.score for r in found])
  tolerance.assert_close(scores, want(SCALAR), bounds)
  assert len({r.score for r in found}) == len(found)


def _texts(found: list[Response]) -> list[tuple]:
  return [(r.row, r.sample, tuple(r.ids)) for r in found]


@pytest.mark.slow
@pytest.mark.parametrize('batch_size', [1, 6])
def test_the_batch_size_changes_nothing(batch_size: int):
  base = _respond(PROMPTS, num_samples=2)
  found = _respond(PROMPTS, num_samples=2, batch_size=batch_size)
  assert _texts(found) == _texts(base)
  for one, other in zip(found, base, strict=True):
    bounds = _logprob_bounds(other)
    tolerance.assert_close(one.logprob, other.logprob, bounds)


def test_order_and_neighbours_change_nothing():
  base = {tuple(PROMPTS[r.row]): r.ids for r in _respond(PROMPTS[:3])}
  moved = _respond([PROMPTS[4], PROMPTS[2], PROMPTS[0]])
  for response, prompt in zip(moved[1:], (2, 0), strict=True):
    assert response.ids == base[tuple(PROMPTS[prompt])]


def test_more_samples_change_no_earlier_one():
  few = _texts(_respond(PROMPTS))
  many = _texts(_respond(PROMPTS, num_samples=2))
  assert [text for text in many if text[1] == 0] == few


def test_a_prompt_that_comes_again_gets_another_response():
  found = _respond(PROMPTS)
  assert PROMPTS[0] == PROMPTS[3] and found[0].ids != found[3].ids


def test_the_seed_changes_the_text():
  found = [_texts(_respond(PROMPTS, seed=seed)) for seed in (5, 5, 6)]
  assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_greedy_text_does_not_depend_on_the_seed():
  greedy = dataclasses.replace(SETTINGS, temperature=0.0)
  found = [_respond(PROMPTS, settings=greedy, seed=s) for s in (1, 2)]
  assert _texts(found[0]) == _texts(found[1])
  assert found[0][0].ids == found[0][3].ids


@pytest.mark.parametrize(
    ('wanted', 'drawn', 'multiple', 'rows'),
    [(32, 100, 8, 32), (30, 100, 8, 32), (32, 3, 8, 8), (1, 9, 1, 1)],
)
def test_rows_of_a_batch(wanted: int, drawn: int, multiple: int, rows: int):
  assert responses.batch_rows(wanted, drawn, multiple) == rows


def test_a_model_of_nan_is_reported():
  broken = jax.tree.map(lambda x: x, PARAMS)
  broken['final_norm'] = {'scale': broken['final_norm']['scale'] * jnp.nan}
  models: Any = dataclasses.replace(
      _models(), policy=(tiny.SHAPE, broken), reward_model=None
  )
  with (
      jax.set_mesh(models.mesh),
      pytest.raises(ValueError, match='prompt 1 got a response of log-prob na'),
  ):
    options = {'num_samples': 1, 'seed': 5, 'batch_size': 4}
    list(responses.respond(models, PROMPTS[:1] * 4, SETTINGS, **options))
