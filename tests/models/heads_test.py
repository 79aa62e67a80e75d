"""Tests of `models.heads`."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.models import gemma, heads, huggingface
from tests.models.drawn import TINY, draw, left_padded
from tests.oracle import cases, folder, tensor

PARAMS = draw('scalar', TINY, seed=1)
_scores = jax.jit(heads.token_scores, static_argnums=0)


def test_scores_are_states_times_head() -> None:
  tokens, mask = left_padded([5, 3], 7)
  hidden = gemma.hidden_states(TINY, PARAMS['backbone'], tokens, mask)
  want = np.zeros((2, 7))
  for row, column in np.ndindex(2, 7):
    want[row, column] = sum(
        float(h) * float(w)
        for h, w in zip(hidden[row, column], PARAMS['head'], strict=True)
    )
  out = _scores(TINY, PARAMS, tokens, mask)
  np.testing.assert_allclose(out[mask], want[mask], atol=1e-5)


def test_end_scores_are_read_at_the_last_real_token() -> None:
  scores = jnp.array([[1.0, 2.0, 3.0, np.nan], [np.nan, 5.0, 6.0, 7.0]])
  mask = jnp.array([[True, True, True, False], [False, True, True, True]])
  np.testing.assert_array_equal(heads.end_scores(scores, mask), [3.0, 7.0])


def test_scores_of_bfloat16_are_float32() -> None:
  half = dataclasses.replace(TINY, dtype='bfloat16')
  tokens, mask = left_padded([5, 0], 7)
  scores = _scores(half, PARAMS, tokens, mask)
  assert scores.dtype == jnp.float32
  assert np.isfinite(scores).all()


def test_head_gets_gradient_from_real_tokens_only() -> None:
  tokens, mask = left_padded([5, 3], 7)

  def loss(head: jax.Array) -> jax.Array:
    scores = heads.token_scores(TINY, {**PARAMS, 'head': head}, tokens, mask)
    return jnp.sum(jnp.where(mask, scores, 0))

  hidden = gemma.hidden_states(TINY, PARAMS['backbone'], tokens, mask)
  np.testing.assert_allclose(
      jax.grad(loss)(PARAMS['head']), hidden[mask].sum(0), rtol=1e-4, atol=1e-4
  )


def test_abstract_params_are_the_real_ones_unallocated() -> None:
  config = dataclasses.replace(TINY, param_dtype='bfloat16')
  for kind in heads.MODELS:
    real = heads.init_params(kind, config, jax.random.key(0))
    like = heads.abstract_params(kind, config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )
    assert {x.dtype for x in jax.tree.leaves(real)} == {jnp.dtype('bfloat16')}
  assert like['head'].shape == (24,)


def test_initial_weights_have_unit_gain() -> None:
  params = heads.init_params('scalar', TINY, jax.random.key(0))
  layers, rms = params['backbone']['layers'], lambda x: float(jnp.std(x))
  # Standard deviation 1 / sqrt(number of summed inputs).
  assert rms(layers['attention']['query']) == pytest.approx(24**-0.5, rel=0.1)
  assert rms(layers['attention']['out']) == pytest.approx(40**-0.5, rel=0.1)
  assert rms(layers['mlp']['down']) == pytest.approx(36**-0.5, rel=0.1)
  assert rms(params['backbone']['embedding']) == pytest.approx(
      24**-0.5, rel=0.1
  )
  assert rms(params['head']) == pytest.approx(25**-0.5, rel=0.4)
  query = layers['attention']['query']
  assert not jnp.allclose(query[0], query[1])  # each layer has its own
  assert not any(layers['mlp_norm']['scale'].ravel())


def _oracle(case: dict[str, Any], dtype: str) -> tuple[np.ndarray, np.ndarray]:
  """Our numbers and the authors' of one case, where theirs are defined."""
  path: pathlib.Path = folder() / 'reward_model'
  config = dataclasses.replace(
      huggingface.read_shape(path), dtype=dtype, param_dtype=dtype
  )
  params = huggingface.load_params(path, config, 'scalar')
  tokens = np.array(case['input_ids'], np.int32)
  mask = np.array(case['attention_mask'], bool)
  if case['kind'] == 'backbone':
    hidden = gemma.hidden_states(config, params['backbone'], tokens, mask)
    logits = gemma.head_logits(hidden, params['backbone']['embedding'])
    ours = np.concatenate([hidden, logits], -1)
    names = ('last_hidden_state', 'tied_head_logits')
    return ours, np.concatenate([tensor(case['f64'][n]) for n in names], -1)
  ours = np.asarray(_scores(config, params, tokens, mask))
  if case['kind'] == 'pairwise':
    return ours, tensor(case['f64']['token_rewards'])
  defined = np.array(case['values_defined'], bool)
  return ours[defined], tensor(case['f64']['values'])[defined]


@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [('float32', 1e-4), ('float64', 1e-9)]
)
def test_oracle_reward_model(dtype: str, tolerance: float) -> None:
  with jax.enable_x64(dtype == 'float64'):
    for case in cases('reward_model/cases.json'):
      ours, theirs = _oracle(case, dtype)
      assert ours.dtype == dtype
      np.testing.assert_allclose(
          ours, theirs, rtol=0, atol=tolerance, err_msg=case['id']
      )
