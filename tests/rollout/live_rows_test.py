"""Rows that have ended are set aside, and come back in their order."""

import jax
import jax.numpy as jnp
import numpy as np

from ma_rlhf_jax.rollout import decode, live_rows, sampling
from tests import tiny

PARAMS = tiny.params('policy', 7)
SAMPLED = decode.SamplingSettings(
    tiny.RESPONSE_LEN, tiny.EOS, tiny.PAD, temperature=0.9
)


def test_the_smallest_batch_that_holds_the_live_rows_goes_on() -> None:
  prompts = tiny.prompts([0, 1, 2, 4] * 2)
  keys = sampling.row_keys(
      jax.random.key(0), 3, prompts.prompt_ids_B, prompts.sample_ids_B
  )
  start = jax.jit(decode.start, static_argnums=(0, 4))
  state = start(tiny.SHAPE, PARAMS, prompts, keys, SAMPLED)
  mark = lambda state: state.replace(
      kept_mass_BT=jnp.full_like(state.kept_mass_BT, state.done_B.shape[0])
  )
  for live, size in ((8, 8), (5, 8), (4, 4), (3, 4), (2, 2), (1, 2), (0, 2)):
    done_B = jnp.arange(8) % 8 >= live
    order = np.random.default_rng(live).permutation(8)
    given = state.replace(done_B=done_B[order])
    ran = live_rows.run(mark, given, most=4)
    found = live_rows.in_order(ran)
    np.testing.assert_array_equal(found.tokens_BT, state.tokens_BT)
    np.testing.assert_array_equal(found.done_B, given.done_B)
    marked = np.asarray(found.kept_mass_BT[:, 0] == size)
    assert marked[~np.asarray(given.done_B)].all() and marked.sum() == size
