"""Macro actions of the authors' code: boundaries, pooling, rewards, losses.

Every case is padded to the columns of the widest, so that one compiled program
serves a file, and padding is seen to change nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import switches
from ma_rlhf_jax.macro import aggregate, authors, termination
from ma_rlhf_jax.objective import losses, rewards
from tests import oracle
from tests.authors import columns

Case = dict[str, Any]
_pool = jax.jit(aggregate.pool, static_argnames='weights')
_fixed = jax.jit(termination.fixed, static_argnames='ngram')
_from_lengths = jax.jit(termination.from_lengths)
_ppl = jax.jit(authors.ppl)
_counted = jax.jit(columns.counted)
_last_column_alone = jax.jit(authors.last_column_alone)
_token_rewards = jax.jit(rewards.token_rewards, static_argnames='score_clip')


def _widest(cases: list[Case]) -> int:
  return max(case['resp_width'] for case in cases)


def _boundaries(case: Case, starts: jax.Array) -> list[int]:
  """Their list, with the last entry twice where the empty step is."""
  width = jnp.array([case['resp_width']])
  columns = oracle.columns(starts.shape[1], case['resp_width'])
  opens, empty = _last_column_alone(starts, columns, width)
  found = np.flatnonzero(opens[0] & columns[0]).tolist()
  twice = [found[-1]] if int(empty[0]) < starts.shape[1] else []
  return [case['start'] + column for column in [*found, *twice]]


def test_oracle_segmentation_fixed():
  cases = oracle.cases('segmentation_fixed.json')
  width = _widest(cases)
  for case in cases:
    mask = oracle.response_mask(case, width)
    counted = _counted(mask, jnp.array([case['resp_width']]))
    ngram = case['ngram'] if 0 < case['ngram'] < case['resp_width'] else 0
    got = _boundaries(case, _fixed(counted, ngram=ngram))
    assert got == case['ma_lengths'], case['id']
    assert (got[-1] == got[-2]) == case['has_empty_segment'], case['id']


def test_oracle_segmentation_randomized():
  cases = oracle.cases('segmentation_randomized.json')
  width = _widest(cases)
  most = max(len(case['shuffled_list']) for case in cases)
  for case in cases:
    mask = oracle.response_mask(case, width)
    counted = _counted(mask, jnp.array([case['resp_width']]))
    lengths = case['shuffled_list']
    # A length beyond the response is one more macro action, as no length is.
    lengths = [*lengths, *[2**20] * (most - len(lengths))]
    starts = _from_lengths(counted, jnp.array([lengths]))
    assert _boundaries(case, starts) == case['ma_lengths'], case['id']


def test_oracle_segmentation_ppl():
  cases = oracle.cases('segmentation_ppl.json')
  width = _widest(cases)
  with jax.enable_x64(True):
    for case in cases:
      nll = np.log(oracle.tensor([case['ppl']]))
      starts = _ppl(
          -oracle.pad(nll, width), oracle.columns(width, case['resp_width'])
      )
      assert _boundaries(case, starts) == case['ma_lengths'], case['id']


def test_oracle_macro_action():
  cases = oracle.cases('macro_action.json')
  width = max(len(c['action_mask'][0]) - c['start'] for c in cases)
  weights = {'equal': 'equal', 'position': 'position_reversed'}
  with jax.enable_x64(True):
    for case in cases:
      if case['error']:
        assert case['value_function'] not in weights, case['id']
        continue
      macro, real = oracle.macro_of(case, width)
      x = oracle.response(case, 'variables', width)
      rules = [weights[case['value_function']]]
      if rules == ['equal']:
        rules.append('mean')  # the same under the name rewards have
      theirs = oracle.tensor(case['ma_variables'])[0]
      for rule in rules:
        got = np.asarray(_pool(x, macro, weights=rule))[0, : len(real)]
        oracle.close(got, theirs[real], case['id'])
      assert not np.delete(theirs, real).any(), case['id']


def test_oracle_value_functions_that_crash_are_refused():
  crashed = {
      case['value_function']
      for case in oracle.cases('macro_action.json')
      if case['error']
  }
  for value in crashed:
    config = config_lib.apply_arguments(config_lib.base(), 'authors')
    config.macro.value = value
    found = switches.problems(config_lib.flatten(config))
    assert any(f'macro.value={value!r}' in line for line in found)


def test_oracle_compute_rewards():
  cases = oracle.cases('compute_rewards.json')
  with jax.enable_x64(True):
    for case in cases:
      logprobs, ref_logprobs, score = (
          jnp.asarray(oracle.tensor(case[name]))
          for name in ('logprobs', 'ref_logprobs', 'reward_score')
      )
      mask = np.array(case['action_mask'], bool)[:, case['start'] :]
      width = jnp.full(len(mask), mask.shape[1])
      column = columns.score_column(jnp.asarray(mask), width) + case['start']
      assert column.tolist() == case['score_index'], case['id']
      everywhere = jnp.ones(logprobs.shape, bool)  # prompts and pads, as theirs
      settings = dict(
          score_clip=case['clip_reward_value'], score_column_B=column
      )
      for units, name in ((score, 'rewards'), (0 * score, 'kl_term')):
        got = _token_rewards(
            logprobs,
            ref_logprobs,
            units,
            everywhere,
            kl_coef=case['kl_ctl'],
            **settings,
        )
        oracle.close(got, oracle.tensor(case[name]), case['id'])


@pytest.mark.parametrize('which', ['actor', 'critic'])
def test_oracle_losses(which: str):
  cases = oracle.cases('losses.json')
  width = _widest(cases)
  name, other = {
      'actor': ('logprobs', 'advantages'),
      'critic': ('values', 'returns'),
  }[which]

  def loss(new, old, aim_BM, macro, clip_eps):
    weights = losses.loss_weights(
        macro.mask_BT, macro.starts_BT, reduction='sequence'
    )
    aim = aggregate.spread(aim_BM, macro)
    if which == 'actor':
      return losses.policy_loss(
          new, old, aim, weights, macro, clip_eps=clip_eps
      )[0]
    mask = macro.mask_BT
    # A python float decides whether there is clipping at all.
    return losses.value_loss(new, old, aim, weights, mask, clip_eps=clip_eps)[0]

  run = jax.jit(jax.value_and_grad(loss), static_argnums=4)
  with jax.enable_x64(True):
    for case in cases:
      macro, real = oracle.macro_of(case, width, mask='response_mask')
      new, old = (
          oracle.pad(oracle.tensor(case[f'{age}_{name}']), width)
          for age in ('new', 'old')
      )
      aim = oracle.pad(oracle.tensor(case[other])[:, real], width, 0.0)
      clip_eps = {'actor': 'cliprange', 'critic': 'cliprange_value'}[which]
      got, grad = run(new, old, aim, macro, case[clip_eps])
      oracle.close(got, oracle.tensor([case[f'{which}_loss']])[0], case['id'])
      theirs = oracle.tensor(case[f'grad_new_{name}'])
      oracle.close(grad[:, : theirs.shape[1]], theirs, case['id'])
      assert not grad[:, theirs.shape[1] :].any()
