"""After the first step nothing is compiled again, however long rows are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.ppo.stage import PPO
from ma_rlhf_jax.structs import Models
from tests import tiny

_COMPILED = '/jax/core/compile/backend_compile_duration'


@pytest.mark.parametrize(
    'one_pass', ['joint', pytest.param('off', marks=pytest.mark.slow)]
)
def test_twenty_steps_of_varied_lengths_compile_once(
    tmp_path: Any, one_pass: str
) -> None:
  config = tiny.config(
      ppo__batch_size=8,
      ppo__micro_batch_size=2,
      ppo__length_buckets=3,
      ppo__one_pass=one_pass,
      ppo__steps=30,
  )
  params = Models(
      policy=tiny.params('policy', 0),
      ref_policy=tiny.params('policy', 2),
      critic=tiny.params('scalar', 1),
      reward_model=tiny.params('scalar', 3),
  )
  run = tiny.run(tmp_path, config, mesh=tiny.mesh(1, 1, 1))
  shapes = Models(*[tiny.SHAPE] * 4)
  stage = PPO(run, shapes, jax.tree.map(jnp.array, params))
  compiled, lengths = [], []

  def listen(event: str, seconds: float, **unused: Any) -> None:
    del seconds, unused
    if event == _COMPILED:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with jax.set_mesh(run.mesh):
      states = stage.states
      for index in range(22):
        states, metrics = stage.step(states, index)
        lengths.append(float(metrics['response/length']))
        if index == 1:  # the second finds outputs of programs as its inputs
          assert compiled
          compiled.clear()
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(set(np.round(lengths, 2))) > 10
  assert compiled == []
