"""Log-probs, values and scores stand where the layout says they do."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import Models, Scored, SequenceBatch
from tests import tiny, tolerance
from tests.models.drawn import plain_gemma

POLICY = tiny.params('policy', 0)
SCALAR = tiny.params('scalar', 1)
ROWS = [0, 2, 3, 7]
_logprobs = jax.jit(
    functools.partial(
        scoring.response_logprobs,
        tiny.SHAPE,
        temperature=0.7,
        with_entropy=True,
    )
)
_values = jax.jit(functools.partial(scoring.response_values, tiny.SHAPE))
_scores = jax.jit(functools.partial(scoring.sequence_scores, tiny.SHAPE))


def _unpadded(rows: SequenceBatch, row: int) -> tuple[np.ndarray, int]:
  """The real tokens of a row, and how many of them are prompt."""
  mask = np.asarray(rows.mask_BL[row])
  count = int(np.asarray(rows.response_mask_BT[row]).sum())
  return np.asarray(rows.tokens_BL[row])[mask], int(mask.sum()) - count


def test_logprobs_and_entropies_are_those_of_each_next_token():
  rows = tiny.sequences(ROWS)
  logprobs, entropy = _logprobs(POLICY, rows)
  want, want_entropy = np.zeros((4, 8)), np.zeros((4, 8))
  embedding = np.asarray(POLICY['embedding'], np.float64)
  for row in range(4):
    tokens, start = _unpadded(rows, row)
    states = plain_gemma(tiny.SHAPE, POLICY, tokens)
    for t, token in enumerate(tokens[start:]):
      # The state after the prompt and the t tokens before this one.
      logits = embedding @ states[start + t - 1] / 0.7
      probs = np.exp(logits) / np.exp(logits).sum()
      want[row, t] = np.log(probs[token])
      want_entropy[row, t] = -(probs @ np.log(probs))
  bounds = tiny.rounding(lambda p: _logprobs(p, rows), POLICY)
  tolerance.assert_close((logprobs, entropy), (want, want_entropy), bounds)


def test_values_are_of_the_state_before_each_token():
  rows = tiny.sequences(ROWS)
  want = np.zeros((4, 8))
  for row in range(4):
    tokens, start = _unpadded(rows, row)
    states = plain_gemma(tiny.SHAPE, SCALAR['backbone'], tokens)
    count = len(tokens) - start
    want[row, :count] = (states @ np.asarray(SCALAR['head']))[start - 1 : -1]
  bounds = tiny.rounding(lambda p: _values(p, rows), SCALAR)
  tolerance.assert_close(_values(SCALAR, rows), want, bounds)


def test_scores_are_at_the_last_real_token():
  rows = tiny.sequences(ROWS)
  # A row whose response is empty is scored at the end of its prompt.
  empty = jnp.arange(tiny.PROMPT_LEN + tiny.RESPONSE_LEN) >= tiny.PROMPT_LEN
  rows = rows.replace(mask_BL=rows.mask_BL.at[1].set(rows.mask_BL[1] & ~empty))
  rows = rows.replace(response_mask_BT=rows.response_mask_BT.at[1].set(False))
  want = [
      plain_gemma(tiny.SHAPE, SCALAR['backbone'], _unpadded(rows, row)[0])[-1]
      @ np.asarray(SCALAR['head'])
      for row in range(4)
  ]
  bounds = tiny.rounding(lambda p: _scores(p, rows), SCALAR)
  tolerance.assert_close(_scores(SCALAR, rows), np.array(want), bounds)


def test_what_padding_holds_does_not_matter():
  rows = tiny.sequences(ROWS)
  other = rows.replace(tokens_BL=jnp.where(rows.mask_BL, rows.tokens_BL, 13))
  assert (other.tokens_BL != rows.tokens_BL).any()
  for got, want in zip(
      (*_logprobs(POLICY, other), _values(SCALAR, other)),
      (*_logprobs(POLICY, rows), _values(SCALAR, rows)),
      strict=True,
  ):
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert not got[~rows.response_mask_BT].any()
    assert (got[rows.response_mask_BT] != 0).all()
  np.testing.assert_allclose(
      _scores(SCALAR, other), _scores(SCALAR, rows), atol=1e-6
  )


def test_sampler_statistics_by_hand():
  nan = math.nan
  mask = jnp.array([[True, True, False], [True, False, False]])
  stats = scoring.sampler_statistics(
      jnp.array([[-1.0, -0.25, nan], [-2.0, nan, nan]]),
      jnp.array([[0.5, 1.0, nan], [0.75, nan, nan]]),
      jnp.array([[-1.5, -0.5, nan], [-1.25, nan, nan]]),
      mask,
  )
  # (.5 + .25 - .75) / 3; (.5 + 0 + .25) / 3
  np.testing.assert_allclose(stats['sampler/kl'], 0, atol=1e-7)
  np.testing.assert_allclose(stats['sampler/cut_mass'], 0.25, rtol=1e-6)
  moved = scoring.sampler_statistics(
      jnp.full((2, 3), -0.5), jnp.ones((2, 3)), jnp.full((2, 3), -2.0), mask
  )
  np.testing.assert_allclose(moved['sampler/kl'], 1.5, rtol=1e-6)


@pytest.mark.parametrize('num', [1, 2, 3, 6])
def test_micro_batches_equal_the_whole(num: int):
  rows = {'x': jnp.arange(24.0).reshape(6, 4), 'y': jnp.arange(6) * 5}
  seen = []

  def function(rows):
    seen.append(rows['x'].shape[0])
    return jnp.cumsum(rows['x'], axis=1), (rows['y'] + 1,)

  got = scoring.in_micro_batches(function, rows, num)
  want = function(rows)
  assert seen[0] == 6 // num
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1][0], want[1][0])


def test_gradients_reach_the_states_before_response_tokens_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  rows = tiny.sequences(ROWS)
  states, head = scoring.hidden_and_head(
      tiny.SHAPE, POLICY, rows.tokens_BL, rows.mask_BL
  )

  def loss(hidden_BLD: jax.Array) -> jax.Array:
    monkeypatch.setattr(
        scoring,
        'hidden_and_head',
        lambda *given: (hidden_BLD[:, -given[-1] :], head),
    )
    logprobs_BT, _ = scoring.response_logprobs(
        tiny.SHAPE, POLICY, rows, temperature=0.7
    )
    return jnp.sum(jnp.sin(logprobs_BT))

  moved_BL = np.abs(jax.grad(loss)(states)).max(axis=-1) > 0
  want_BL = np.zeros_like(moved_BL)
  want_BL[:, tiny.PROMPT_LEN - 1 : -1] = np.asarray(rows.response_mask_BT)
  # Neither the prompt but its last token, nor the last response token, nor
  # padding on either side.
  np.testing.assert_array_equal(moved_BL, want_BL)


_MODELS = Models(POLICY, tiny.params('policy', 2), SCALAR, SCALAR)


@functools.partial(jax.jit, static_argnames='only')
def _asked(params: Models, only: tuple[str, ...] = Models._fields) -> Scored:
  return scoring.score_rows(
      Models(*[tiny.SHAPE] * 4),
      params,
      tiny.sequences(ROWS),
      temperature=0.7,
      width=None,
      only=only,
  )


def test_only_models_that_are_asked_answer_and_as_they_do_together():
  everything = _asked(_MODELS)
  fields = {
      'policy': 'logprobs_BT',
      'ref_policy': 'ref_logprobs_BT',
      'critic': 'values_BT',
      'reward_model': 'score_B',
  }
  for names in (('policy',), ('critic',), ('ref_policy', 'reward_model')):
    found = _asked(_MODELS, only=names)
    told = {fields[name] for name in names}
    for field, x in vars(found).items():
      assert (x is not None) == (field in told), (names, field)
      if x is not None:
        want = getattr(everything, field)
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)


def test_without_a_critic_every_value_is_zero():
  everything = _asked(_MODELS)
  found = _asked(_MODELS._replace(critic=None))
  assert not found.values_BT.any() and everything.values_BT.any()
  for field in ('logprobs_BT', 'ref_logprobs_BT', 'entropy_BT', 'score_B'):
    want = getattr(everything, field)
    np.testing.assert_allclose(getattr(found, field), want, rtol=1e-5)
