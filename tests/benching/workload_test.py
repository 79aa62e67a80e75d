"""What is measured has the shape and the lengths that are asked."""

import jax
import numpy as np
import pytest

from ma_rlhf_jax.benching import workload
from ma_rlhf_jax.parallel.mesh import make_mesh
from ma_rlhf_jax.ppo import step
from tests import tiny


def test_full_lengths_fill_every_column() -> None:
  prompts, responses = workload.lengths('full', 3, 7, 5)
  assert prompts.tolist() == [7] * 3 and responses.tolist() == [5] * 3


def test_hh_lengths_have_the_means_of_hh_rows() -> None:
  prompts, responses = workload.lengths('hh', 20_000, 512, 512)
  # Cut at 512 the means of 150 and 100 become 145 and 99.
  assert abs(prompts.mean() - 145) < 3 and abs(responses.mean() - 99) < 3
  assert prompts.min() >= 8 and responses.max() == 512
  again, _ = workload.lengths('hh', 20_000, 512, 512)
  np.testing.assert_array_equal(prompts, again)


@pytest.mark.slow
def test_responses_have_the_lengths_that_are_asked_for() -> None:
  config = tiny.config(
      data__max_prompt_len=16, data__max_response_len=16, ppo__batch_size=8
  )
  config.model.vocab_size = 50
  with jax.set_mesh(make_mesh(config.mesh)):
    work = workload.make(config, 'hh')
    prompts = work.prompts(2)
    rollout = step.respond(work.programs, work.states, prompts, 2)
  mask = np.asarray(rollout.sequences.response_mask_BT)
  assert mask.sum(1).tolist() == work.response_lengths.tolist()
  assert len(set(work.response_lengths.tolist())) > 1
  lengths = np.asarray(prompts.mask_BP).sum(1)
  assert lengths.tolist() == work.prompt_lengths.tolist()
  assert (np.asarray(prompts.prompt_ids_B) == 16 + np.arange(8)).all()
