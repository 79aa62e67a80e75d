"""Stages without weights have the programs and shapes of those with them."""

import pathlib

import jax
import pytest

from ma_rlhf_jax.models import heads, presets
from ma_rlhf_jax.structs import Params
from ma_rlhf_jax.training import checkpoint
from ma_rlhf_jax.training.abstract import abstract_stages
from ma_rlhf_jax.structs import Models
from ma_rlhf_jax.ppo.stage import PPO
from ma_rlhf_jax.training.run import Run
from tests import tiny

_FIELDS = {
    f'model__{name}': getattr(tiny.SHAPE, name)
    for name in presets.SHAPE_FIELDS
    if name != 'sliding_layers'
}


def _run(workdir: pathlib.Path, **fields: object) -> Run:
  return tiny.run(workdir, tiny.config(**_FIELDS, **fields))


@pytest.mark.slow
def test_the_stages_of_the_config_are_made(tmp_path: pathlib.Path) -> None:
  run = _run(tmp_path, stages=('sft', 'ppo'), ppo__one_pass='off')
  stages = abstract_stages(run)
  assert list(stages) == ['sft', 'ppo']
  assert list(stages['sft'].programs()) == ['sft/update']
  assert list(stages['ppo'].programs()) == [
      'ppo/reshard',
      'ppo/rollout',
      'ppo/score',
      'ppo/experience',
      'ppo/update_policy',
      'ppo/update_critic',
  ]
  for one_pass, rest in (('joint', []), ('policy', ['ppo/update_critic'])):
    stage = abstract_stages(_run(tmp_path, ppo__one_pass=one_pass))['ppo']
    assert list(stage.programs())[2:] == ['ppo/one_pass', *rest]
  without = abstract_stages(
      _run(tmp_path, ppo__baseline='rloo', ppo__samples_per_prompt=2)
  )
  assert 'ppo/update_critic' not in without['ppo'].programs()


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 2])
def test_a_state_has_the_shapes_of_a_real_one(
    tmp_path: pathlib.Path, rank: int
) -> None:
  run = _run(tmp_path, lora__rank=rank, ppo__one_pass='off')
  with jax.set_mesh(run.mesh):
    abstract = abstract_stages(run)['ppo']
    learns = presets.trained(tiny.SHAPE, run.config)
    frozen = presets.frozen(tiny.SHAPE, run.config.model)

    def model(kind: str, shape: presets.GemmaConfig) -> Params:
      return heads.init_params(kind, shape, jax.random.key(0))

    shapes = Models(learns, frozen, learns, frozen)
    kinds = Models('policy', 'policy', 'scalar', 'scalar')
    real = PPO(run, shapes, Models(*map(model, kinds, shapes)))
    assert abstract.states == checkpoint.abstract_of(real.states)
    want = checkpoint.abstract_of(real.programs()['ppo/score'].args[0].tree)
    assert abstract.programs()['ppo/score'].args[0].tree == want


@pytest.mark.slow
@pytest.mark.parametrize('one_pass', ['off', 'policy'])
def test_each_program_is_given_what_the_one_before_makes(
    tmp_path: pathlib.Path, one_pass: str
) -> None:
  run = _run(tmp_path, ppo__one_pass=one_pass)
  with jax.set_mesh(run.mesh):
    programs = abstract_stages(run)['ppo'].programs()
    made = {n: jax.eval_shape(p.function, *p.args) for n, p in programs.items()}
  looks = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  rollout = looks(made['ppo/rollout'])
  if one_pass == 'off':
    assert looks(programs['ppo/score'].args[1]) == rollout.sequences
    told = looks(programs['ppo/experience'].args[:2])
    assert told == (rollout, looks(made['ppo/score']))
    experience = looks(made['ppo/experience'][0])
    assert looks(programs['ppo/update_policy'].args[2]) == experience
  else:
    assert looks(programs['ppo/one_pass'].args[2]) == rollout
    experience = looks(made['ppo/one_pass'][1])
  assert looks(programs['ppo/update_critic'].args[2]) == experience


def test_frozen_models_may_wait_on_the_host(tmp_path: pathlib.Path) -> None:
  run = _run(tmp_path, model__frozen_memory='host', ppo__one_pass='off')
  with jax.set_mesh(run.mesh):
    score = abstract_stages(run)['ppo'].programs()['ppo/score']
    program = str(score.function.trace(*score.args).jaxpr)
  models = score.args[0].tree
  kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
  waiting = (models.ref_policy, models.reward_model)
  assert kinds(waiting) == {'pinned_host'}
  assert kinds((models.policy, models.critic)) == {'device'}
  assert program.count('device_put') == len(jax.tree.leaves(waiting))
