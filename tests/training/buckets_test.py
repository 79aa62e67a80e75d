"""Micro-batches of several widths give what one wide batch gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.parallel.mesh import place
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import Array, Params, SequenceBatch
from ma_rlhf_jax.training import buckets, update
from tests import tiny, tolerance

LENGTH = tiny.PROMPT_LEN + tiny.RESPONSE_LEN
ROWS = tiny.sequences([0, 1, 2, 7, 3, 4, 5, 6])
POLICY, SCALAR = tiny.params('policy', 0), tiny.params('scalar', 1)


def test_buckets_by_hand() -> None:
  make = buckets.make_buckets
  assert make(1024, 256, 0, count=1, groups=1) == ((1024,), (256,))
  assert make(1024, 256, 8, count=1, groups=1) == ((1024,), (8,))
  assert make(256, 64, 0, count=0, groups=1) == ((256,), (64,))
  found = make(1024, 256, 0, count=0, groups=8)
  assert found.widths == (128, 256, 384, 512, 768, 1024)
  assert found.sizes == (128, 64, 40, 32, 16, 16)  # 21 rows are two of eight
  # At least a row a device, and no more rows than there are.
  found = make(1024, 16, 1, count=0, groups=8)
  assert found.sizes == (8,) * 6
  assert make(1000, 4, 4, count=2, groups=1) == ((504, 1000), (4, 4))


def test_rows_are_dealt_by_length() -> None:
  which, longest = buckets._dealt(jnp.array([3, 9, 4, 9, 1, 5]), 2)
  assert which.tolist() == [[1, 5, 0], [3, 2, 4]]
  assert longest.tolist() == [9, 5, 3]


@pytest.mark.parametrize('rows', [8, 13])
def test_sums_and_results_are_those_of_the_rows(rows: int) -> None:
  lengths = np.random.default_rng(rows).integers(1, 40, size=rows)
  split = buckets.Buckets((8, 16, 40), (6, 3, 2))
  seen = []

  def function(batch: dict, width: int) -> tuple:
    seen.append((width, batch['x'].shape[0]))
    # No row is longer than it may be.
    fits = batch['length'] <= width
    return jnp.sum(batch['x']), (2 * batch['x'], fits)

  x = np.arange(rows, dtype=np.float32) + 1
  batch = {'x': x, 'length': lengths}
  run = jax.jit(functools.partial(buckets.run, split, function))
  total, (doubled, fits) = run(batch, jnp.asarray(lengths))
  assert float(total) == x.sum()
  np.testing.assert_array_equal(doubled, 2 * x)
  assert fits.all()
  assert set(seen) == {(8, 6), (16, 3), (40, 2)}


def test_computed_tokens_are_those_of_the_loop() -> None:
  lengths = [3, 9, 4, 40, 1, 5, 17, 8, 16]
  split = buckets.Buckets((8, 16, 40), (6, 3, 2))
  # 40 and 17; 16, 9 and 8; the rest.
  want = 2 * 40 + 3 * 16 + 6 * 8
  assert buckets.computed_tokens(split, lengths) == want

  def function(batch: Array, width: int) -> tuple:
    columns = jnp.int32(width * batch.shape[0])
    return columns, ()

  total, _ = buckets.run(
      split, function, jnp.zeros(9), jnp.asarray(lengths, jnp.int32)
  )
  assert int(total) == want
  whole = buckets.Buckets((40,), (3,))
  assert buckets.computed_tokens(whole, lengths) == 9 * 40


def _scores(
    split: buckets.Buckets, models: tuple[Params, Params], rows: SequenceBatch
) -> tuple:
  """Log-probs, values and scores that a policy and a critic give to rows."""
  policy, scalar = models

  def function(rows: SequenceBatch, width: int | None) -> tuple:
    logprobs_BT, entropy_BT = scoring.response_logprobs(
        tiny.SHAPE,
        policy,
        rows,
        temperature=0.7,
        with_entropy=True,
        width=width,
    )
    values = scoring.response_values(tiny.SHAPE, scalar, rows, width)
    score_B = scoring.sequence_scores(tiny.SHAPE, scalar, rows, width)
    return (), (logprobs_BT, entropy_BT, values, score_B)

  lengths_B = masking.lengths(rows.mask_BL)
  return buckets.run(split, function, rows, lengths_B)[1]


def test_rows_too_short_for_two_widths_are_one_micro_batch() -> None:
  made = buckets.make_buckets(8, 56, 0, count=2, groups=1)
  assert made == buckets.Buckets((8,), (56,))


@pytest.mark.parametrize(
    'axes',
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param((1, 2, 4), marks=pytest.mark.slow),
        (2, 4, 1),
    ],
    ids=str,
)
def test_scores_are_those_of_whole_rows(axes: tuple | None) -> None:
  widths = (LENGTH // 2, LENGTH - 2, LENGTH)
  models = POLICY, SCALAR
  whole = jax.jit(functools.partial(_scores, buckets.Buckets((0,), (8,))))
  want = whole(models, ROWS)
  if axes is None:
    split = buckets.Buckets(widths, (4, 3, 2))
    found = jax.jit(functools.partial(_scores, split))(models, ROWS)
  else:
    mesh = tiny.mesh(*axes)
    split = buckets.Buckets(widths, (8, 8, 8))
    with jax.set_mesh(mesh):
      run = jax.jit(functools.partial(_scores, split))
      found = run(models, place(ROWS, mesh))
  lengths = np.asarray(masking.lengths(ROWS.mask_BL))
  assert lengths.min() <= widths[0] < lengths.max()
  bounds = tiny.rounding(lambda p: whole(p, ROWS), models)
  tolerance.assert_close(found, want, bounds)


def test_gradients_are_those_of_whole_rows() -> None:
  def loss_fn(
      params: dict, rows: SequenceBatch, width: int | None = None
  ) -> tuple[Array, dict]:
    values_BT = scoring.response_values(tiny.SHAPE, params, rows, width)
    return jnp.sum(jnp.square(values_BT)), {'sum': jnp.sum(values_BT)}

  split = buckets.Buckets((LENGTH // 2, LENGTH), (4, 3))
  by_length = split, masking.lengths(ROWS.mask_BL)
  whole = jax.jit(functools.partial(update.accumulate_gradients, loss_fn))
  parts = jax.jit(
      functools.partial(
          update.accumulate_gradients, loss_fn, by_length=by_length
      )
  )
  # The longest sums of a gradient go over all tokens.
  bounds = tolerance.of_sums(
      lambda p: whole(p, ROWS), (SCALAR,), ROWS.tokens_BL.size
  )
  tolerance.assert_close(parts(SCALAR, ROWS), whole(SCALAR, ROWS), bounds)
