"""Responses to held-out prompts, and the numbers told of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.rollout import decode, layout, scoring
from ma_rlhf_jax.structs import Rollout
from ma_rlhf_jax.training import judge
from ma_rlhf_jax.training.run import Run
from tests import tiny

POLICY = judge.Model(tiny.SHAPE, tiny.params('policy', 7))
REF_POLICY = judge.Model(tiny.SHAPE, tiny.params('policy', 2))
REWARD_MODEL = judge.Model(tiny.SHAPE, tiny.params('scalar', 3))


def _sample(
    run: Run, num_rollouts: int = 1, stream: str = 'rollout'
) -> Rollout:
  rows = np.arange(8)
  return layout.sample_responses(
      POLICY.params,
      judge.prompt_batch(run, run.data.eval, rows),
      run.key(stream),
      0,
      layout=run.decode_layout(tiny.SHAPE),
      settings=run.sampling(),
      num_rollouts=num_rollouts,
  )


def _judge(run: Run, num_prompts: int = 6, **fields: Any) -> judge.Judged:
  how = {'stream': 'evaluate', 'temperature': 1.0}
  how |= {'ref_policy': REF_POLICY, 'reward_model': REWARD_MODEL}
  return judge.judge(run, POLICY, num_prompts=num_prompts, **{**how, **fields})


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
  """Eight held-out prompts, judged four at a time."""
  return tiny.run(tmp_path_factory.mktemp('run'), tiny.config())


@pytest.fixture(scope='module')
def judged(run: Run) -> judge.Judged:
  """The first six of them."""
  return _judge(run)


def test_occurrence_by_hand():
  rows = np.array([7, 3, 7, 7, 3, 0])
  assert judge._occurrence(rows).tolist() == [0, 0, 1, 2, 1, 0]
  assert judge._occurrence(np.array([4, 4])).tolist() == [0, 1]
  assert judge._occurrence(np.arange(5)[::-1]).tolist() == [0] * 5


def test_samples_of_a_prompt_are_numbered_in_the_batch(run: Run):
  # Row 5 comes twice, because the batch reaches into the next epoch.
  made = judge.prompt_batch(run, run.data.ppo, [5, 1, 5], samples=2)
  assert made.prompt_ids_B.tolist() == [5, 5, 1, 1, 5, 5]
  assert made.sample_ids_B.tolist() == [0, 1, 0, 1, 2, 3]
  want = tiny.prompts([5, 5, 1, 1, 5, 5])
  np.testing.assert_array_equal(made.tokens_BP, want.tokens_BP)
  np.testing.assert_array_equal(made.mask_BP, want.mask_BP)


@pytest.mark.slow
def test_batches_of_rollouts_change_no_token(run: Run):
  whole = _sample(run)
  parts = _sample(run, num_rollouts=4)
  jax.tree.map(np.testing.assert_array_equal, parts.sequences, whole.sequences)
  np.testing.assert_allclose(
      parts.sample_logprobs_BT, whole.sample_logprobs_BT, atol=1e-5
  )
  other = _sample(run, stream='evaluate')
  assert (other.sequences.tokens_BL != whole.sequences.tokens_BL).any()


def _found(run: Run, temperature: float = 1.0) -> Rollout:
  """The responses that `judge` draws, all in one batch."""
  return layout.sample_responses(
      POLICY.params,
      judge.prompt_batch(run, run.data.eval, np.arange(8)),
      run.key('evaluate'),
      0,
      layout=run.decode_layout(tiny.SHAPE),
      settings=run.sampling(temperature),
  )


def test_texts_leave_out_special_tokens(run: Run, judged: judge.Judged):
  rows = _found(run).sequences
  letters = lambda ids: ''.join('~.^abcdefghijklmnopq'[i] for i in ids if i > 2)
  tokens = np.asarray(masking.response_tokens(rows))
  want = [letters(ids) for ids in tokens[:6]]
  assert judged.responses == want
  data = run.data.eval
  assert judged.prompts == [letters(data.prompt[row]) for row in range(6)]
  assert len(set(judged.responses)) > 3


def test_numbers_of_each_response(run: Run, judged: judge.Judged):
  rows = _found(run).sequences
  mask = np.asarray(rows.response_mask_BT)[:6]
  lengths = mask.sum(1)
  tokens = np.asarray(masking.response_tokens(rows))[:6]
  ended = [tiny.EOS in ids[m] for ids, m in zip(tokens, mask, strict=True)]
  numbers = judged.numbers
  assert numbers['length'].tolist() == lengths.tolist()
  assert numbers['ended'].tolist() == ended
  assert set(ended) == {True, False}  # the seed shows both
  golds = [
      10 * len(prompt) + len(set(response))
      for prompt, response in zip(judged.prompts, judged.responses, strict=True)
  ]
  assert numbers['gold'].tolist() == golds
  scores = scoring.sequence_scores(*REWARD_MODEL, rows)
  np.testing.assert_allclose(numbers['score'], scores[:6], atol=1e-5)
  logprobs, ref_logprobs = (
      scoring.response_logprobs(*model, rows, temperature=1.0, chunk_tokens=99)[
          0
      ]
      for model in (POLICY, REF_POLICY)
  )
  kl = jnp.sum(logprobs - ref_logprobs, axis=1)
  np.testing.assert_allclose(numbers['kl'], kl[:6], atol=1e-4)
  assert all(x.dtype == np.float64 for x in numbers.values())
  assert judged.means()['length'] == lengths.mean()


def test_one_stream_gives_the_same_texts_again(run: Run, judged: judge.Judged):
  again = _judge(run)
  assert again.responses == judged.responses
  jax.tree.map(np.testing.assert_array_equal, again.numbers, judged.numbers)
  assert _judge(run, stream='compare_ppo').responses != judged.responses


def test_fewer_prompts_are_the_first_of_more(run: Run, judged: judge.Judged):
  fewer = _judge(run, num_prompts=3, ref_policy=None, reward_model=None)
  assert fewer.responses == judged.responses[:3]
  assert fewer.numbers.keys() == {'gold', 'length', 'ended'}
  more = _judge(run, num_prompts=99)
  assert more.prompts[:6] == judged.prompts and len(more.prompts) == 8
  assert more.responses[:6] == judged.responses


def test_other_rows_may_be_judged(run: Run, judged: judge.Judged):
  other = run.data.eval.take([5, 3])
  found = _judge(run, data=other)
  assert found.prompts == [judged.prompts[5], judged.prompts[3]]
  assert all(len(x) == 2 for x in found.numbers.values())


def test_padding_that_is_eos_ends_no_response(tmp_path: Any):
  run = tiny.run(
      tmp_path,
      tiny.config(rollout__min_new_tokens=tiny.RESPONSE_LEN),
      tokenizer=tiny.Tokenizer(pad_token_id=tiny.EOS),
      gold=None,
  )
  numbers = _judge(run, ref_policy=None, reward_model=None).numbers
  assert numbers.keys() == {'length', 'ended'}
  assert numbers['length'].tolist() == [tiny.RESPONSE_LEN] * 6
  assert numbers['ended'].tolist() == [0] * 6


def test_table_shows_the_first_rows(judged: judge.Judged):
  table = judged.table(2)
  assert all(text in table for text in judged.responses[:2])
  assert len(judged.responses[2]) > 2 and judged.responses[2] not in table
  assert all(name in table for name in ('gold', 'kl', 'length'))
  unscored = judge.Judged(['ab'], ['cdef'], {'length': np.array([5.0])})
  assert 'cdef' in unscored.table(4)


def test_sampling_settings_are_those_of_the_config(tmp_path: Any):
  config = tiny.config(
      rollout__top_k=7,
      rollout__top_p=0.75,
      rollout__min_new_tokens=2,
      rollout__temperature=0.6,
  )
  run = tiny.run(tmp_path, config)
  want = decode.SamplingSettings(
      max_new_tokens=tiny.RESPONSE_LEN,
      eos_id=tiny.EOS,
      pad_id=tiny.PAD,
      temperature=0.6,
      top_k=7,
      top_p=0.75,
      min_new_tokens=2,
  )
  assert run.sampling() == want
  assert run.sampling(0.0).temperature == 0
