"""What the host is asked about responses, and what comes of its answers."""

from typing import Any

import jax
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.parallel.mesh import place
from ma_rlhf_jax.ppo.host import Host, HostAnswers
from ma_rlhf_jax.structs import Rollout
from tests import tiny

ROWS = tiny.sequences([0, 1, 2, 7])
PROMPTS = tiny.prompts([0, 1, 2, 7])


def _rollout(mesh: jax.sharding.Mesh) -> Rollout:
  nothing = np.zeros(ROWS.response_mask_BT.shape, np.float32)
  rows = jax.tree.map(np.asarray, ROWS)
  return place(Rollout(rows, nothing, nothing), mesh)


def test_without_a_rule_nothing_is_asked() -> None:
  asked = Host().ask(PROMPTS, object(), tiny.mesh(1, 1, 1))
  assert asked.answers == HostAnswers() and asked.metrics == {}


def test_the_rule_sees_responses_and_its_answers_lie_on_the_devices() -> None:
  mesh, seen = tiny.mesh(2, 2, 1), []

  def rule(tokens_BT: Any, mask_BT: Any) -> tuple[Any, dict]:
    seen.append((tokens_BT, mask_BT))
    counts = {
        'sentences': np.array([3, 1, 2, 0]),
        'fallbacks': np.array([1, 0, 2, 0]),
    }
    return tokens_BT % 2 == 1, counts

  with jax.set_mesh(mesh):
    asked = Host(rule).ask(PROMPTS, _rollout(mesh), mesh)
  ((tokens_BT, mask_BT),) = seen
  assert isinstance(tokens_BT, np.ndarray) and isinstance(mask_BT, np.ndarray)
  response_BT = np.asarray(ROWS.tokens_BL)[:, tiny.PROMPT_LEN :]
  np.testing.assert_array_equal(tokens_BT, response_BT)
  np.testing.assert_array_equal(mask_BT, ROWS.response_mask_BT)
  starts_BT = asked.answers.starts_BT
  np.testing.assert_array_equal(starts_BT, response_BT % 2 == 1)
  assert len(starts_BT.sharding.device_set) == 4
  assert asked.answers.score_B is None
  # 6 sentences of 4 responses; 3 of the 6 fell back.
  assert {k: float(x) for k, x in asked.metrics.items()} == {
      'macro/sentences': 1.5,
      'macro/fallback': 0.5,
  }


def test_a_rule_that_counts_nothing_tells_nothing() -> None:
  mesh = tiny.mesh(1, 1, 1)
  host = Host(lambda tokens, mask: (mask, {}))
  asked = host.ask(PROMPTS, _rollout(mesh), mesh)
  np.testing.assert_array_equal(asked.answers.starts_BT, ROWS.response_mask_BT)
  assert asked.metrics == {}


@pytest.mark.parametrize('with_rule', [False, True])
def test_a_reward_sees_the_row_of_each_response(with_rule: bool) -> None:
  mesh, seen = tiny.mesh(2, 2, 1), []

  def reward(rows_B: Any, tokens_BT: Any, mask_BT: Any) -> np.ndarray:
    seen.append((rows_B, tokens_BT, mask_BT))
    return rows_B + np.float32(0.5)

  rule = (lambda tokens, mask: (mask, {})) if with_rule else None
  with jax.set_mesh(mesh):
    prompts = place(jax.tree.map(np.asarray, PROMPTS), mesh)
    asked = Host(rule, reward).ask(prompts, _rollout(mesh), mesh)
  ((rows_B, tokens_BT, mask_BT),) = seen
  assert rows_B.tolist() == [0, 1, 2, 7]
  np.testing.assert_array_equal(tokens_BT, masking.response_tokens(ROWS))
  np.testing.assert_array_equal(mask_BT, ROWS.response_mask_BT)
  score_B = asked.answers.score_B
  assert score_B.tolist() == [0.5, 1.5, 2.5, 7.5]
  assert score_B.dtype == np.float32
  assert len(score_B.sharding.device_set) == 4
  assert (asked.answers.starts_BT is not None) == with_rule
  assert asked.metrics == {}
