"""A step against a reward function, beside or instead of the reward model."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.ppo import stage as stage_lib
from ma_rlhf_jax.ppo import step as step_lib
from ma_rlhf_jax.structs import Models
from ma_rlhf_jax.training import judge
from tests import tiny

_MODULE = """
def vowels(prompts, responses, rows):
  assert all(set(row) == {'chosen', 'rejected'} for row in rows)
  return [sum(map(r.count, 'aeiou')) - 0.5 * len(p)
          for p, r in zip(prompts, responses)]
"""


def _stage(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> stage_lib.PPO:
  (tmp_path / 'seam_rewards.py').write_text(_MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  defaults = {'ppo__batch_size': 8, 'macro__ngram': 3}
  for name in ('ppo', 'critic'):  # steps as large as their gradients
    defaults |= {f'{name}__optim__eps': 1e-2, f'{name}__optim__lr': 1e-2}
  config = tiny.config(**defaults | fields)
  run = tiny.run(tmp_path, config)
  copy = lambda params: jax.tree.map(jnp.array, params)  # steps donate
  has_model = 'model' in config.reward.split('+')
  params = Models(
      policy=copy(tiny.params('policy', 0)),
      ref_policy=tiny.params('policy', 2),
      critic=copy(tiny.params('scalar', 1)),
      reward_model=tiny.params('scalar', 3) if has_model else None,
  )
  configs = Models(*[tiny.SHAPE] * 4)
  if not has_model:
    configs = configs._replace(reward_model=None)
  return stage_lib.PPO(run, configs, params)


def _step(stage: stage_lib.PPO) -> tuple[dict, dict]:
  with jax.set_mesh(stage.run.mesh):
    return jax.device_get(stage.step(stage.states, 0))


def _by_hand(stage: stage_lib.PPO) -> np.ndarray:
  """The function's scores of the responses of the first step."""
  run = stage.run
  with jax.set_mesh(run.mesh):
    prompts = judge.prompt_batch(run, stage.data, stage.rows(0))
    rollout = step_lib.respond(stage.programs, stage.states, prompts, 0)
  tokens = np.asarray(masking.response_tokens(rollout.sequences))
  mask = np.asarray(rollout.sequences.response_mask_BT)
  letters = '~.^abcdefghijklmnopq'  # of `tiny.Tokenizer`, special ones first
  vowels = np.isin(tokens, [letters.index(x) for x in 'aeio']) & mask
  lengths = [len(stage.data.prompt[row]) - 1 for row in stage.rows(0)]  # BOS
  return vowels.sum(1) - 0.5 * np.array(lengths)


def test_the_score_is_that_of_the_function(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  stage = _stage(tmp_path, monkeypatch, reward='seam_rewards:vowels')
  assert list(stage.programs.listing()) == [
      'ppo/reshard',
      'ppo/rollout',
      'ppo/one_pass',
  ]
  want = _by_hand(stage)
  states, metrics = _step(stage)
  np.testing.assert_allclose(metrics['objective/score'], want.mean(), rtol=1e-6)
  apart = _stage(
      tmp_path,
      monkeypatch,
      reward='seam_rewards:vowels',
      ppo__one_pass='off',
  )
  other, found = _step(apart)
  assert found.keys() == metrics.keys()
  for name in ('policy', 'critic'):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
        states[name].params,
        other[name].params,
    )


def test_a_function_is_added_to_the_reward_model(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  both = _stage(tmp_path, monkeypatch, reward='model+seam_rewards:vowels')
  alone = _stage(tmp_path, monkeypatch)
  want = _step(alone)[1]['objective/score'] + _by_hand(both).mean()
  np.testing.assert_allclose(_step(both)[1]['objective/score'], want, rtol=1e-5)


def test_the_evaluation_scores_as_training_does(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  stage = _stage(tmp_path, monkeypatch, reward='seam_rewards:vowels')
  policy = judge.Model(tiny.SHAPE, tiny.params('policy', 0))
  with jax.set_mesh(stage.run.mesh):
    found = judge.judge(
        stage.run,
        policy,
        num_prompts=8,
        stream='evaluate',
        temperature=1.0,
        ref_policy=judge.Model(tiny.SHAPE, tiny.params('policy', 2)),
    )
  want = [
      sum(map(response.count, 'aeiou')) - 0.5 * len(prompt)
      for prompt, response in zip(found.prompts, found.responses, strict=True)
  ]
  np.testing.assert_allclose(found.numbers['score'], want, rtol=1e-6)
  assert {'kl', 'policy_kl'} <= found.numbers.keys()
