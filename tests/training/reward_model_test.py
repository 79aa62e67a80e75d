"""Reward modelling on pairs that are easy to tell apart."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ma_rlhf_jax.data import batches
from ma_rlhf_jax.data.parts import Datasets
from ma_rlhf_jax.models import huggingface
from ma_rlhf_jax.models.heads import token_scores
from ma_rlhf_jax.objective import preference
from ma_rlhf_jax.structs import Array, PairBatch, Params, SequenceBatch
from ma_rlhf_jax.training import reward_model, update
from ma_rlhf_jax.training.reward_model import RewardModel
from tests import oracle, other_kernel, tiny, tolerance
from tests.data.rows import encoded_set

_SEED = 5


def _stage(workdir: pathlib.Path, **fields: Any) -> RewardModel:
  """The stage on the rows of `tiny.encoded` or on `rows`."""
  rows = fields.pop('rows', None) or tiny.encoded()
  defaults = {'reward_model__steps': 12, 'reward_model__batch_size': 3}
  run = tiny.run(
      workdir,
      tiny.config(**{**defaults, **fields}),
      data=Datasets(rows, rows, rows, rows, counts={}),
  )
  return RewardModel(run, tiny.SHAPE, tiny.params('scalar', _SEED))


def _pairs(rows: list[int]) -> PairBatch:
  return batches.pair_batch(
      tiny.encoded(),
      rows,
      prompt_len=tiny.PROMPT_LEN,
      response_len=tiny.RESPONSE_LEN,
      pad_id=tiny.PAD,
  )


_token_scores = jax.jit(token_scores, static_argnums=0)


def _scores(rows: SequenceBatch) -> Array:
  """Token scores of the model that every stage here starts from."""
  params = tiny.params('scalar', _SEED)
  return _token_scores(tiny.SHAPE, params, rows.tokens_BL, rows.mask_BL)


@pytest.mark.slow
def test_a_pair_that_differs_in_one_word_is_learned(
    tmp_path: pathlib.Path,
) -> None:
  # Whatever the prompt, a response of 9s is better than one of 8s.
  rows = encoded_set(
      [
          ([2, p], [9] * n + [1], [8] * n + [1])
          for p, n in zip(
              (10, 11, 12, 13, 14, 15), (1, 2, 3, 4, 5, 6), strict=True
          )
      ]
  )
  stage = _stage(tmp_path, rows=rows, reward_model__optim__lr=1e-2)
  states, found = stage.states, []
  before = stage.evaluate(states)
  for index in range(12):
    states, metrics = stage.step(states, index)
    found.append({name: float(x) for name, x in metrics.items()})
  after = stage.evaluate(states)
  assert before['eval/accuracy'] <= 0.5 and after['eval/accuracy'] == 1.0
  assert after['eval/loss'] < 0.2 < 0.6 < before['eval/loss']
  assert found[-1]['reward_model/accuracy'] == 1.0
  assert found[-1]['loss/reward_model'] < found[0]['loss/reward_model'] / 2
  assert sorted(found[0]) == [
      'loss/reward_model',
      'reward_model/accuracy',
      'reward_model/chosen_score',
      'reward_model/grad_norm',
      'reward_model/lr',
      'reward_model/rejected_score',
      'tokens',
  ]


def test_held_out_scores_are_those_of_the_last_real_tokens(
    tmp_path: pathlib.Path,
) -> None:
  # 8 rows in batches of 3, 3 and 2
  stage = _stage(tmp_path)
  found = stage.held_out_scores(stage.states)
  pairs = _pairs(list(range(8)))
  rows = pairs.chosen
  (bound,) = tiny.rounding(
      lambda p: _token_scores(tiny.SHAPE, p, rows.tokens_BL, rows.mask_BL),
      tiny.params('scalar', _SEED),
  )
  assert bound < 1e-3  # scores are about 1
  for scores_B, rows in zip(found, (pairs.chosen, pairs.rejected), strict=True):
    plain_BL = np.asarray(_scores(rows))
    last = [max(np.flatnonzero(mask)) for mask in rows.mask_BL]
    want_B = [row[column] for row, column in zip(plain_BL, last, strict=True)]
    assert scores_B.shape == (8,)
    np.testing.assert_allclose(scores_B, want_B, rtol=0, atol=bound)


def test_evaluation_counts_pairs_and_measures_their_margins(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  stage = _stage(tmp_path)
  scores = np.asarray([1.0, -1.0, 2.0, 0.5]), np.asarray([0.0, 1.0, -1.0, 0.5])
  monkeypatch.setattr(stage, 'held_out_scores', lambda _: scores)
  found = stage.evaluate(stage.states)
  # margins 1, -2, 3, 0; a tie is no success
  losses = [
      np.log1p(np.exp(-1)),
      np.log1p(np.exp(2)),
      np.log1p(np.exp(-3)),
      np.log(2),
  ]
  assert found == {
      'eval/accuracy': 0.5,
      'eval/margin': 0.5,
      'eval/loss': pytest.approx(sum(losses) / 4),
      # 1 - 1 + 2 + 0.5 + 0 + 1 - 1 + 0.5 = 3; squares 8.5
      'eval/score_mean': pytest.approx(3 / 8),
      'eval/score_std': pytest.approx((8.5 / 8 - (3 / 8) ** 2) ** 0.5),
  }


_START = tiny.params('scalar', _SEED)


@functools.cache
def _sgd(
    loss: str, num_micro: int
) -> Callable[[Params], tuple[Params, dict[str, Array]]]:
  """Makes of parameters these less the gradient of 4 pairs, and the metrics."""
  optimizer = optax.sgd(1.0)
  pair_loss = functools.partial(
      preference.pair_loss,
      loss=loss,
      pad_id=tiny.PAD,
      num_padding_at_beginning=0,
  )
  step = jax.jit(
      functools.partial(
          reward_model._step,
          shape=tiny.SHAPE,
          pair_loss=pair_loss,
          optimizer=optimizer,
          num_micro=num_micro,
      )
  )

  def less_gradient(params: Params) -> tuple[Params, dict[str, Array]]:
    state = update.init_state(jax.tree.map(jnp.asarray, params), optimizer)
    state, metrics = step(state, {}, _pairs([6, 1, 4, 3]))
    return state.params, metrics

  return less_gradient


@pytest.mark.parametrize('loss', ['authors', 'per_token'])
def test_what_a_kernel_says_at_padding_changes_no_loss(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
  rows = [6, 1, 4]
  pairs = jax.tree.map(jnp.asarray, _pairs(rows))
  scores = _scores(pairs.chosen), _scores(pairs.rejected)
  plain = preference.PAIR_LOSSES[loss](*scores, pairs, tiny.PAD, 0)
  other_kernel.install(monkeypatch)
  stage = _stage(tmp_path, reward_model__loss=loss)
  monkeypatch.setattr(stage, 'rows', lambda index: rows)
  _, metrics = stage.step(stage.states, 0)
  found = float(metrics['loss/reward_model'])
  assert found == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.parametrize(
    'loss',
    [
        'per_token',
        pytest.param('last_token', marks=pytest.mark.slow),
        pytest.param('authors', marks=pytest.mark.slow),
    ],
)
def test_each_loss_of_micro_batches_is_that_of_the_batch(loss: str) -> None:
  _, metrics = _sgd(loss, 2)(_START)
  pairs = jax.tree.map(jnp.asarray, _pairs([6, 1, 4, 3]))
  scores = _scores(pairs.chosen), _scores(pairs.rejected)
  plain = preference.PAIR_LOSSES[loss](*scores, pairs, tiny.PAD, 0)
  found = float(metrics['loss/reward_model'])
  assert found == pytest.approx(float(plain), rel=1e-5)
  real = pairs.chosen.mask_BL.sum() + pairs.rejected.mask_BL.sum()
  assert metrics['tokens'] == real


def test_the_gradient_of_micro_batches_is_that_of_the_batch() -> None:
  whole, cut = _sgd('per_token', 1), _sgd('per_token', 2)
  # The longest sums of a gradient go over all tokens of 8 rows.
  length = 8 * (tiny.PROMPT_LEN + tiny.RESPONSE_LEN)
  bounds = tolerance.of_sums(whole, (_START,), length)
  tolerance.assert_close(cut(_START), whole(_START), bounds)
  moved = jax.tree.map(jnp.subtract, whole(_START)[0], _START)
  for x, bound in zip(jax.tree.leaves(moved), bounds, strict=False):
    assert np.abs(x).max() > 100 * bound


def test_the_table_shows_no_more_rows_than_are_held_out(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  stage = _stage(tmp_path, log__samples=99)
  scores = np.arange(8) + 0.25, np.arange(8) - 10.5
  monkeypatch.setattr(stage, 'held_out_scores', lambda _: scores)
  stage.evaluate(stage.states)
  lines = stage.samples(stage.states).split('\n')
  assert len(lines) == 1 + 8
  assert 'score of rejected' in lines[0]
  assert lines[8].split()[-2:] == ['7.250', '-3.500']


def test_oracle_reward_model_loss_and_gradients() -> None:
  path = oracle.folder() / 'reward_model'
  found = oracle.cases('reward_model/cases.json')
  found = [case for case in found if case['kind'] == 'pairwise']
  oracle.need(found, 'pairs')
  shape = dataclasses.replace(
      huggingface.read_shape(path), dtype='float64', param_dtype='float64'
  )

  @functools.partial(jax.jit, static_argnames='pads')
  def loss_and_gradient(params: Params, ids: Array, mask: Array, pads: int):
    def loss(params: Params) -> Array:
      scores = token_scores(shape, params, ids, mask)
      half = len(ids) // 2
      return preference.authors_pair_loss(
          scores[:half],
          scores[half:],
          ids[:half],
          ids[half:],
          pad_id=0,
          num_padding_at_beginning=pads,
      )

    return jax.value_and_grad(loss)(params)

  # More pads on the right change nothing, and one width is compiled once.
  width = max(np.shape(case['input_ids'])[1] for case in found)
  grown = lambda rows: np.pad(rows, [(0, 0), (0, width - len(rows[0]))])
  with jax.enable_x64(True):
    params = huggingface.load_params(path, shape, 'scalar')
    for case in found:
      ids, mask = grown(case['input_ids']), grown(case['attention_mask']) > 0
      pads = case['num_padding_at_beginning']
      loss, gradient = loss_and_gradient(params, ids, mask, pads)
      want = case['f64']
      close = functools.partial(
          np.testing.assert_allclose, rtol=1e-8, atol=1e-9, err_msg=case['id']
      )
      close(loss, want['loss'])
      close(gradient['head'], oracle.tensor(want['grad_v_head'])[0])
      final_norm = gradient['backbone']['final_norm']['scale']
      close(final_norm, oracle.tensor(want['grad_final_norm']))
      # Theirs gives the embedding of the pad no gradient.
      embedding = gradient['backbone']['embedding']
      gradient['backbone']['embedding'] = embedding.at[0].set(0)
      close(optax.tree.norm(gradient), want['global_grad_norm'])
