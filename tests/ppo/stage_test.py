"""Whole steps of the PPO stage."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.models import lora
from ma_rlhf_jax.ppo import stage as stage_lib
from ma_rlhf_jax.ppo import step as step_lib
from ma_rlhf_jax.structs import Models
from ma_rlhf_jax.training import judge, model_configs
from tests import tiny

POLICY, CRITIC = tiny.params('policy', 0), tiny.params('scalar', 1)


# Whole steps of the stage.


def _stage(
    mesh: jax.sharding.Mesh,
    tmp: Any,
    tokenizer: tiny.Tokenizer = tiny.Tokenizer(),  # noqa: B008
    **fields: Any,
) -> stage_lib.PPO:
  """A stage whose optimizers do not blow up gradients of 1e-7."""
  defaults = {
      'ppo__batch_size': 8,
      'ppo__micro_batch_size': 0,
      'ppo__optim__eps': 1e-2,
      'ppo__optim__lr': 1e-2,
      'critic__optim__eps': 1e-2,
      'critic__optim__lr': 1e-2,
  }
  config = tiny.config(**{**defaults, **fields})
  run = tiny.run(tmp, config, mesh=mesh, tokenizer=tokenizer)
  copy = lambda params: jax.tree.map(jnp.array, params)  # steps donate
  params = Models(
      policy=copy(POLICY),
      ref_policy=tiny.params('policy', 2),
      critic=copy(CRITIC),
      reward_model=tiny.params('scalar', 3),
  )
  return stage_lib.PPO(run, Models(*[tiny.SHAPE] * 4), params)


@pytest.fixture(scope='module')
def stepped(tmp_path_factory: pytest.TempPathFactory) -> tuple:
  """The first step on one device."""
  stage = _stage(tiny.mesh(1, 1, 1), tmp_path_factory.mktemp('one'))
  with jax.set_mesh(stage.run.mesh):
    states, metrics = stage.step(stage.states, 0)
  return jax.device_get((states, metrics))


def test_the_first_update_starts_at_ratio_one(stepped: tuple):
  metrics = stepped[1]
  np.testing.assert_allclose(metrics['policy/ratio'], 1, rtol=1e-5)
  np.testing.assert_allclose(metrics['policy/approxkl'], 0, atol=1e-6)
  assert metrics['policy/clipfrac'] == metrics['critic/clipfrac'] == 0
  # Unfiltered samples at the scorer's temperature.
  np.testing.assert_allclose(metrics['sampler/kl'], 0, atol=1e-5)
  np.testing.assert_allclose(metrics['sampler/cut_mass'], 0, atol=1e-5)


def test_a_step_moves_both_models_and_says_what_it_did(stepped: tuple):
  states, metrics = stepped
  for name, before in (('policy', POLICY), ('critic', CRITIC)):
    assert int(states[name].step) == 1
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), states[name].params, before
    )
    assert all(1e-7 < x < 0.1 for x in jax.tree.leaves(moved))
  known = {
      'objective/kl',
      'objective/entropy',
      'objective/score',
      'loss/policy',
      'loss/critic',
      'policy/clipfrac',
      'policy/approxkl',
      'policy/grad_norm',
      'critic/grad_norm',
      'critic/explained_variance',
      'response/length',
      'tokens',
  }
  assert known <= metrics.keys()
  assert all(np.isfinite(x) for x in metrics.values())


def test_padding_with_eos_takes_the_same_step(stepped: tuple, tmp_path: Any):
  tokenizer = tiny.Tokenizer(pad_token_id=tiny.EOS)
  stage = _stage(tiny.mesh(1, 1, 1), tmp_path, tokenizer)
  with jax.set_mesh(stage.run.mesh):
    states, metrics = stage.step(stage.states, 0)
  assert stage.run.spec.sampling().pad_id == stage.run.spec.sampling().eos_id
  want_states, want = stepped
  assert want['response/length'] < tiny.RESPONSE_LEN  # some have ended
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
  for name in ('policy', 'critic'):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        states[name].params,
        want_states[name].params,
    )


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one(stepped: tuple, tmp_path: Any):
  stage = _stage(tiny.mesh(8, 1, 1), tmp_path)
  with jax.set_mesh(stage.run.mesh):
    states, metrics = stage.step(stage.states, 0)
  spread = states['policy'].params['embedding'].sharding.device_set
  assert len(spread) == 8
  assert metrics.keys() == stepped[1].keys()
  for name, value in stepped[1].items():
    np.testing.assert_allclose(
        metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )
  for name in ('policy', 'critic'):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        jax.device_get(states[name].params),
        stepped[0][name].params,
    )


def test_the_critic_warms_up_alone(tmp_path: Any):
  fields = {'ppo__kl_target': 1e-3, 'ppo__critic_warmup_updates': 1}
  stage = _stage(tiny.mesh(1, 1, 1), tmp_path, **fields)
  with jax.set_mesh(stage.run.mesh):
    states, metrics = stage.step(stage.states, 0)
  # The coefficient waits for a policy that can follow it.
  assert abs(metrics['objective/kl']) > 2e-3
  assert states['kl_coef'] == np.float32(0.05)
  assert int(states['policy'].step) == 0 and int(states['critic'].step) == 1
  jax.tree.map(
      np.testing.assert_array_equal, states['policy'].params, dict(POLICY)
  )
  assert 'loss/critic' in metrics and 'loss/policy' not in metrics


def test_a_best_checkpoint_must_be_near_the_reference(tmp_path: Any):
  stage = _stage(tiny.mesh(1, 1, 1), tmp_path, ppo__max_kl=4.0)
  metrics = {'eval/score': 1.5, 'eval/kl': 3.5}
  assert stage.best_value(metrics) == 1.5
  assert stage.best_value(metrics | {'eval/kl': 4.5}) is None


def test_the_loss_of_the_critic_is_half_the_squared_error(tmp_path: Any):
  # `paper` divides a sum over tokens by the number of macro actions. Scores are
  # made large against the values, so that errors are.
  fields = {'macro__ngram': 5, 'critic__target': 'macro', 'ppo__kl_coef': 0.0}
  fields |= {'ppo__loss_reduction': 'macro', 'ppo__score_clip': 0.0}
  fields |= {'critic__clip_eps': 0.0, 'ppo__gae_lambda': 1.0}
  stage = _stage(tiny.mesh(1, 1, 1), tmp_path, **fields)
  reward_model = stage.programs.fixed.reward_model
  reward_model['head'] = reward_model['head'] * 50
  with jax.set_mesh(stage.run.mesh):
    prompts = judge.prompt_batch(stage.run, stage.data, stage.rows(0))
    p, states = stage.programs, stage.states
    rollout = step_lib.respond(p, states, prompts, 0)
    scored = jax.device_get(p.score(states, rollout))
    _, metrics = step_lib.learn(p, states, prompts, rollout, 0)
  mask = np.asarray(rollout.sequences.response_mask_BT)
  # With lambda 1 and no KL a macro action's return is the score.
  error = (scored.values_BT - scored.score_B[:, None])[mask]
  np.testing.assert_allclose(
      metrics['loss/critic'], 0.5 * np.mean(error**2), rtol=1e-4
  )


def test_every_group_of_samples_is_evaluated_on_as_many_prompts(
    tmp_path: Any,
):
  fields = {'ppo__batch_size': 2, 'ppo__samples_per_prompt': 4}
  stage = _stage(tiny.mesh(1, 1, 1), tmp_path, **fields)
  with jax.set_mesh(stage.run.mesh):
    stage.evaluate(stage.states)
  assert len(stage._judged.prompts) == 8  # all that are held out


@pytest.mark.slow
def test_the_kl_coefficient_adapts_and_is_part_of_the_state(tmp_path: Any):
  fields = {'ppo__kl_target': 1e-3, 'ppo__kl_horizon': 80}
  stage = _stage(tiny.mesh(1, 1, 1), tmp_path, **fields)
  with jax.set_mesh(stage.run.mesh):
    states, metrics = stage.step(stage.states, 0)
    _, later = stage.step(states, 1)
  assert metrics['objective/kl_coef'] == np.float32(0.05)
  assert abs(metrics['objective/kl']) > 2e-3
  sign = 1 if metrics['objective/kl'] > 0 else -1
  # At most a fifth of 8 / 80 responses.
  want = 0.05 * (1 + sign * 0.2 * 0.1)
  np.testing.assert_allclose(states['kl_coef'], want, rtol=1e-6)
  np.testing.assert_allclose(later['objective/kl_coef'], want, rtol=1e-6)


@pytest.mark.slow
def test_adapters_learn_beside_weights_shared_with_the_reference(tmp_path: Any):
  run = tiny.run(
      tmp_path,
      tiny.config(ppo__batch_size=8, lora__rank=2, ppo__optim__lr=1e-2),
      mesh=tiny.mesh(1, 1, 1),
  )
  learns = model_configs.trained(tiny.SHAPE, run.config)
  key = jax.random.key(0)
  params = Models(
      policy=lora.add_adapters('policy', learns, POLICY, key),
      ref_policy=POLICY,
      critic=lora.add_adapters('scalar', learns, CRITIC, key),
      reward_model=CRITIC,
  )
  shapes = Models(learns, tiny.SHAPE, learns, tiny.SHAPE)
  stage = stage_lib.PPO(run, shapes, params)
  before = jax.device_get((POLICY, CRITIC))
  with jax.set_mesh(run.mesh):
    states, metrics = stage.step(stage.states, 0)
    states, later = stage.step(states, 1)
  # They start where the reference is, and leave it.
  np.testing.assert_allclose(metrics['objective/kl'], 0, atol=1e-5)
  assert abs(later['objective/kl']) > 1e-4
  # The state, and so a checkpoint, holds what learns; the rest stays.
  for name, tree in (('policy', POLICY), ('critic', CRITIC)):
    learned = lora.flatten(states[name].params)
    assert all('_lora_' in path or path == 'head' for path in learned)
    assert all(np.any(x) for path, x in learned.items())
    base = lora.flatten(
        lora.without_adapters(stage.params(states)._asdict()[name])
    )
    shared = {p: x for p, x in lora.flatten(tree).items() if p != 'head'}
    assert all(base[path] is x for path, x in shared.items())
  jax.tree.map(np.testing.assert_array_equal, (POLICY, CRITIC), before)
