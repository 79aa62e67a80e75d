"""Responses to held-out prompts, and the numbers told of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.data.parts import Datasets
from ma_rlhf_jax.models import gemma
from ma_rlhf_jax.rollout import decode, layout, scoring
from ma_rlhf_jax.structs import Params, Rollout
from ma_rlhf_jax.training import judge
from ma_rlhf_jax.training.run import Run
from tests import tiny, tolerance

POLICY = judge.Model(tiny.SHAPE, tiny.params('policy', 7))
REF_POLICY = judge.Model(tiny.SHAPE, tiny.params('policy', 2))
REWARD_MODEL = judge.Model(tiny.SHAPE, tiny.params('scalar', 3))
_ONE_CHUNK = dataclasses.replace(tiny.SHAPE, logprob_chunk=99)


def _sample(
    run: Run, num_rollouts: int = 1, stream: str = 'rollout'
) -> Rollout:
  rows = np.arange(8)
  return layout.sample_responses(
      POLICY.params,
      judge.prompt_batch(run, run.data.eval, rows),
      run.spec.key(stream),
      0,
      layout=run.spec.decode_layout(tiny.SHAPE),
      settings=run.spec.sampling(),
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


def test_repetition_is_the_share_of_the_most_frequent_token():
  tokens_BT = np.array(
      [
          [4, 4, 9, 4, 7, 0],  # 3 of 5
          [5, 6, 5, 6, 5, 6],  # two in turn: 3 of 6
          [8, 8, 8, 0, 0, 0],  # too short to tell
          [0, 0, 0, 0, 0, 0],  # none
          [3, 3, 3, 3, 3, 3],
      ]
  )
  lengths_B = np.array([5, 6, 3, 0, 6])
  mask_BT = np.arange(6) < lengths_B[:, None]
  found = judge.repetition(tokens_BT, mask_BT)
  np.testing.assert_allclose(found, [0.6, 0.5, 0, 0, 1])


@pytest.mark.slow
def test_batches_of_rollouts_change_no_token(run: Run):
  whole = _sample(run)
  parts = _sample(run, num_rollouts=4)
  jax.tree.map(np.testing.assert_array_equal, parts.sequences, whole.sequences)
  score = functools.partial(
      scoring.response_logprobs, _ONE_CHUNK, temperature=1.0
  )
  bounds = tiny.rounding(lambda p: score(p, whole.sequences)[0], POLICY.params)
  tolerance.assert_close(
      parts.sample_logprobs_BT, whole.sample_logprobs_BT, bounds
  )
  other = _sample(run, stream='evaluate')
  assert (other.sequences.tokens_BL != whole.sequences.tokens_BL).any()


def _found(run: Run, temperature: float = 1.0) -> Rollout:
  """The responses that `judge` draws, all in one batch."""
  return layout.sample_responses(
      POLICY.params,
      judge.prompt_batch(run, run.data.eval, np.arange(8)),
      run.spec.key('evaluate'),
      0,
      layout=run.spec.decode_layout(tiny.SHAPE),
      settings=run.spec.sampling(temperature),
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

  @jax.jit
  def plain(policy: Params, ref_policy: Params, reward_model: Params) -> tuple:
    logprobs, ref_logprobs = (
        scoring.response_logprobs(_ONE_CHUNK, params, rows, temperature=1.0)[0]
        for params in (policy, ref_policy)
    )
    scores = scoring.sequence_scores(tiny.SHAPE, reward_model, rows)
    return scores[:6], jnp.sum(logprobs - ref_logprobs, axis=1)[:6]

  models = POLICY.params, REF_POLICY.params, REWARD_MODEL.params
  bounds = tiny.rounding(lambda p: plain(*p), models)
  found = numbers['score'], numbers['kl']
  tolerance.assert_close(found, plain(*models), bounds)
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
  assert fewer.numbers.keys() == {'gold', 'length', 'ended', 'repeated'}
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
  assert numbers.keys() == {'length', 'ended', 'repeated'}
  assert numbers['length'].tolist() == [tiny.RESPONSE_LEN] * 6
  assert numbers['ended'].tolist() == [0] * 6


@jax.jit
def _logits(params: Params, rows: jax.Array, mask: jax.Array) -> jax.Array:
  hidden = gemma.hidden_states(tiny.SHAPE, params, rows, mask)
  return hidden[:, -1] @ params['embedding'].T


@functools.cache
def _two_tokens() -> tuple[Any, Any, Any, Any]:
  """Logits [8, V] and [8, V, V] under both policies, by enumeration."""
  prompts, vocab = tiny.prompts(list(range(8))), tiny.SHAPE.vocab_size
  found = []
  for model in (POLICY, REF_POLICY):
    first = _logits(model.params, prompts.tokens_BP, prompts.mask_BP)
    append = lambda x, new: np.concatenate([np.repeat(x, vocab, 0), new], 1)
    tokens = np.tile(np.arange(vocab, dtype=np.int32), 8)[:, None]
    then = _logits(
        model.params,
        append(prompts.tokens_BP, tokens),
        append(prompts.mask_BP, tokens >= 0),
    )
    found += [first, then.reshape(8, vocab, vocab)]
  return tuple(np.asarray(x, np.float64) for x in found)


def _expected_log_ratio(temperature: float, top_k: int) -> float:
  """Of a response of at most two tokens: nothing follows EOS."""
  first, then, ref_first, ref_then = _two_tokens()

  def normalised(x: Any) -> Any:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

  def mean(x: Any, ref: Any) -> tuple[Any, Any]:
    """What is drawn, and the mean of its log-ratio."""
    x, ref = (normalised(y / temperature) for y in (x, ref))
    least = np.sort(x, -1)[..., -top_k, None]
    drawn = np.exp(normalised(np.where(x >= least, x, -np.inf)))
    return drawn, (drawn * (x - ref)).sum(-1)

  goes_on = np.arange(first.shape[-1]) != tiny.EOS
  drawn, one = mean(first, ref_first)
  _, two = mean(then, ref_then)
  return float((one + (drawn * goes_on * two).sum(-1)).mean())


def test_the_kl_of_the_policies_is_told_whatever_the_filter(tmp_path: Any):
  rows = tiny.encoded(repeats=64)  # each of eight prompts 64 times
  run = tiny.run(
      tmp_path,
      tiny.config(
          ppo__batch_size=512, rollout__top_k=2, rollout__temperature=0.7
      ),
      data=Datasets(rows, rows, rows, rows, counts={}),
      response_len=2,
      gold=None,
  )
  numbers = _judge(run, num_prompts=512, temperature=0.7).numbers
  # 1.66 nats of filtered samples where 0.23 are true.
  filtered = _expected_log_ratio(0.7, top_k=2)
  true = _expected_log_ratio(1.0, top_k=tiny.SHAPE.vocab_size)
  for name, want in (('kl', filtered), ('policy_kl', true)):
    error = numbers[name].std() / 512**0.5
    assert abs(numbers[name].mean() - want) < 4 * error, (name, want)
    assert abs(filtered - true) > 8 * error  # so one is not the other
  assert numbers.keys() == {
      'kl',
      'policy_kl',
      'score',
      'length',
      'ended',
      'repeated',
  }


def test_plain_samples_serve_for_both_kls(
    run: Run, judged: judge.Judged, monkeypatch: pytest.MonkeyPatch
):
  np.testing.assert_array_equal(
      judged.numbers['kl'], judged.numbers['policy_kl']
  )
  # Nor does a policy have a KL from itself.
  drawn = []
  draw = judge._draw
  monkeypatch.setattr(
      judge, '_draw', lambda *args: drawn.append(args[4:]) or draw(*args)
  )
  _judge(run)
  assert [step for step, _ in drawn] == [0, 0]  # a batch of four each
  numbers = _judge(run, temperature=0.5, ref_policy=POLICY).numbers
  assert not numbers['policy_kl'].any() and len(drawn) == 4
  assert drawn[2][1].temperature == 0.5


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
  assert run.spec.sampling() == want
  assert run.spec.sampling(0.0).temperature == 0
