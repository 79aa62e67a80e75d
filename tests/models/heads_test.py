"""Tests of `models.heads`."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax.models import gemma, heads, huggingface, vocabulary
from ma_rlhf_jax.parallel.mesh import make_mesh
from ma_rlhf_jax.structs import Array, Params
from tests.models.drawn import LENGTHS, TINY, draw, left_padded, states
from tests.oracle import cases, folder, tensor

PARAMS = draw('scalar', TINY, seed=1)
TOKENS, MASK = left_padded(LENGTHS, 9)
HALF = dataclasses.replace(TINY, param_dtype='bfloat16')
_scores = jax.jit(heads.token_scores, static_argnums=0)


@pytest.fixture(scope='module')
def scored() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """States, scores, and the gradient of their masked sum to the head."""

  def total(head: Array) -> tuple[Array, Array]:
    params = {**PARAMS, 'head': head}
    scores = heads.token_scores(TINY, params, TOKENS, MASK)
    return jnp.sum(jnp.where(MASK, scores, 0)), scores

  grad, scores = jax.jit(jax.grad(total, has_aux=True))(PARAMS['head'])
  hidden = states(TINY, PARAMS['backbone'], TOKENS, MASK)
  return np.asarray(hidden), np.asarray(scores), np.asarray(grad)


def test_scores_are_states_times_head(scored: tuple) -> None:
  hidden, scores, _ = scored
  for row, column in zip(*np.nonzero(MASK), strict=True):
    want = sum(
        float(h) * float(w)
        for h, w in zip(hidden[row, column], PARAMS['head'], strict=True)
    )
    assert scores[row, column] == pytest.approx(want, abs=1e-5)


def test_head_gets_gradient_from_real_tokens_only(scored: tuple) -> None:
  hidden, _, grad = scored
  np.testing.assert_allclose(grad, hidden[MASK].sum(0), rtol=1e-4, atol=1e-4)


def test_scores_of_bfloat16_are_float32() -> None:
  half = dataclasses.replace(TINY, dtype='bfloat16')
  scores = _scores(half, PARAMS, TOKENS, MASK)  # one row holds no token
  assert scores.dtype == jnp.float32
  assert np.isfinite(scores).all()


@pytest.fixture(scope='module')
def created() -> tuple[Params, Params]:
  """Initial parameters on eight devices, and what they should be like."""
  key = jax.random.key(0, impl='rbg')  # compiles sooner than the default
  mesh = make_mesh(ConfigDict({'data': 2, 'fsdp': 2, 'tensor': 2}))
  with jax.set_mesh(mesh):
    like = heads.abstract_params('scalar', HALF)
    return heads.init_params('scalar', HALF, key), like


def test_parameters_are_created_in_their_pieces(created: tuple) -> None:
  params, like = created
  assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(
      lambda x: x.sharding, like
  )
  query = params['backbone']['layers']['attention']['query']
  assert {s.data.shape for s in query.addressable_shards} == {(3, 12, 2, 10)}
  assert len(query.sharding.device_set) == 8


def test_initial_weights(created: tuple) -> None:
  params, like = created
  jax.tree.map(chex.assert_trees_all_equal_shapes_and_dtypes, params, like)
  params = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), params)
  assert like['head'].shape == (24,)
  assert like['head'].dtype == jnp.bfloat16
  layers = params['backbone']['layers']
  # Standard deviation 1 / sqrt(number of summed inputs).
  for weight, inputs in [
      (layers['attention']['query'], 24),
      (layers['attention']['out'], 4 * 10),
      (layers['mlp']['down'], 36),
      (params['backbone']['embedding'], 24),
      (params['head'], 24 + 1),
  ]:
    near = pytest.approx(inputs**-0.5, rel=0.5 if weight.ndim == 1 else 0.1)
    assert float(weight.std()) == near
  query = layers['attention']['query']
  assert not np.allclose(query[0], query[1])  # each layer has its own
  assert not layers['mlp_norm']['scale'].any()


def test_choices_of_a_run_change_neither_weights_nor_their_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  key = jax.random.key(3, impl='rbg')
  want = heads.init_params('policy', TINY, key)
  other = dataclasses.replace(
      TINY, dtype='bfloat16', remat='dots', unroll=0, attention='splash'
  )
  plain = gemma.Gemma(other).init(key, *gemma.dummy_inputs())['params']
  # Two roundings of a uniform number near 1, which the tail of the normal
  # distribution makes 9 times larger, and some twenty of its polynomial.
  chex.assert_trees_all_close(want, plain, rtol=0, atol=80 * 2.0**-24)
  monkeypatch.setitem(heads.MODELS, 'policy', None)  # to trace another
  chex.assert_trees_all_equal(want, heads.init_params('policy', other, key))


def test_a_policy_is_the_backbone_of_a_scalar_model() -> None:
  policy = heads.abstract_params('policy', TINY)
  scalar = heads.abstract_params('scalar', TINY)
  assert scalar['backbone'] == policy
  assert set(scalar) == {'backbone', 'head'}


def _grown(rows: list, width: int, height: int) -> np.ndarray:
  """`rows` with zeros to the right and below: one shape, one compilation."""
  rows = np.array(rows, np.int32)
  return np.pad(rows, [(0, height - len(rows)), (0, width - rows.shape[1])])


@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [('float32', 1e-4), ('float64', 1e-9)]
)
def test_oracle_reward_model(dtype: str, tolerance: float) -> None:
  path, found = folder() / 'reward_model', cases('reward_model/cases.json')
  config = dataclasses.replace(
      huggingface.read_shape(path), dtype=dtype, param_dtype=dtype
  )
  shapes = [np.shape(case['input_ids']) for case in found]
  height, width = np.max(shapes, axis=0)
  names = {'pairwise': 'token_rewards', 'forward_value': 'values'}
  with jax.enable_x64(dtype == 'float64'):
    params = huggingface.load_params(path, config, 'scalar')
    for case, (rows, columns) in zip(found, shapes, strict=True):
      tokens = _grown(case['input_ids'], width, height)
      mask = _grown(case['attention_mask'], width, height).astype(bool)
      if case['kind'] == 'backbone':
        ours = states(config, params['backbone'], tokens, mask)
        theirs = tensor(case['f64']['last_hidden_state'])
      else:
        ours = _scores(config, params, tokens, mask)
        theirs = tensor(case['f64'][names[case['kind']]])
      assert ours.dtype == dtype
      # Left pads see no key, so nothing is defined there.
      defined = np.array(case.get('values_defined', np.ones((rows, columns))))
      where = defined.astype(bool)
      np.testing.assert_allclose(
          np.asarray(ours)[:rows, :columns][where],
          theirs[where],
          rtol=0,
          atol=tolerance,
          err_msg=case['id'],
      )


def test_oracle_tied_head() -> None:
  path = folder() / 'reward_model'
  params = huggingface.load_params(path, huggingface.read_shape(path), 'scalar')
  for case in cases('reward_model/cases.json'):
    if case['kind'] == 'backbone':
      logits = vocabulary.head_logits(
          jnp.asarray(tensor(case['f64']['last_hidden_state']), jnp.float32),
          params['backbone']['embedding'],
          softcap=0.0,
      )
      np.testing.assert_allclose(
          logits, tensor(case['f64']['tied_head_logits']), atol=1e-4
      )
