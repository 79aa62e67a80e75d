"""Macro actions of a step, and whose scores count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.macro.termination import TerminationSettings
from ma_rlhf_jax.ppo import method
from ma_rlhf_jax.ppo.host import HostAnswers
from tests.ppo import given

MASK, SCORED = given.MASK, given.SCORED
KEYS = jax.random.split(jax.random.key(2), 2)
_segment = functools.partial(method.segment, MASK, keys_B=KEYS)


def test_before_scores_are_there_a_rule_can_cut_that_asks_no_model():
  segment = functools.partial(_segment, host=HostAnswers())
  for rule in (
      TerminationSettings('fixed', ngram=3),
      TerminationSettings('randomised', random_lengths=(1, 2)),
  ):
    early, late = segment(None, rule=rule), segment(SCORED, rule=rule)
    jax.tree.map(np.testing.assert_array_equal, early, late)


@pytest.mark.parametrize('name', ['ref', 'old'])
def test_probabilities_are_those_of_the_named_model(name: str):
  named = {'ref': SCORED.ref_logprobs_BT, 'old': SCORED.logprobs_BT}
  cuts = {k: termination.ppl_adjacent(x, MASK) for k, x in named.items()}
  rule = TerminationSettings('ppl_adjacent', logprobs=name)
  found = _segment(SCORED, host=HostAnswers(), rule=rule)
  np.testing.assert_array_equal(found.starts_BT, cuts[name])
  assert (cuts['ref'] != cuts['old']).any()


def test_starts_of_the_host_stand_for_the_rule():
  starts = jnp.array([[False, True, False, True], [True, False, True, True]])
  found = _segment(
      None, host=HostAnswers(starts), rule=TerminationSettings('parsing')
  )
  # The first token opens one, and padding none.
  assert found.ids_BT.tolist() == [[0, 1, 1, 2], [0, 0, 4, 4]]


def test_the_score_is_the_sum_of_what_there_is():
  host_B = jnp.array([0.25, 3.0])
  of = lambda scored, host: method.total_score(scored, host).tolist()
  both = HostAnswers(score_B=host_B)
  assert of(SCORED, HostAnswers()) == [4.0, -1.5]
  assert of(SCORED.replace(score_B=None), both) == [0.25, 3.0]
  assert of(SCORED, both) == [4.25, 1.5]
