"""Decoding equals a plain loop, and a row's tokens depend on it alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.models.gemma import hidden_states
from ma_rlhf_jax.models.vocabulary import head_logits
from ma_rlhf_jax.rollout import decode, layout, sampling, scoring
from ma_rlhf_jax.structs import Array, PromptBatch, Rollout
from tests import tiny

T = tiny.RESPONSE_LEN
PARAMS = tiny.params('policy', 7)
ROWS = [0, 1, 2, 4]
SAMPLED = decode.SamplingSettings(T, tiny.EOS, tiny.PAD, temperature=0.9)
GREEDY = dataclasses.replace(SAMPLED, temperature=0.0)
FILTERED = dataclasses.replace(SAMPLED, top_k=9, top_p=0.9, min_new_tokens=5)
_generate = jax.jit(decode.generate, static_argnums=(0, 4))
_states = jax.jit(functools.partial(hidden_states, tiny.SHAPE))
_scored = jax.jit(
    functools.partial(scoring.response_logprobs, tiny.SHAPE, temperature=0.9)
)


def _keys(prompts: PromptBatch, seed: int = 0) -> Array:
  stream = jax.random.key(seed)
  return sampling.row_keys(
      stream, 3, prompts.prompt_ids_B, prompts.sample_ids_B
  )


def _roll(
    prompts: PromptBatch,
    settings: decode.SamplingSettings = SAMPLED,
    seed: int = 0,
) -> Rollout:
  keys = _keys(prompts, seed)
  return _generate(tiny.SHAPE, PARAMS, prompts, keys, settings)


def _responses(rollout: Rollout) -> list[list[int]]:
  """The real response tokens of each row."""
  rows = rollout.sequences
  tokens, mask = masking.response_tokens(rows), rows.response_mask_BT
  return [
      np.asarray(t)[np.asarray(m)].tolist()
      for t, m in zip(tokens, mask, strict=True)
  ]


def _rounding(rollout: Rollout) -> float:
  """How far log-probs may be off, and so a sum of probabilities."""
  logprobs = lambda params: _scored(params, rollout.sequences)[0]
  (bound,) = tiny.rounding(logprobs, PARAMS)
  assert bound < 1e-4  # log-probs are about 3
  # Of those of a filter the log of the kept mass, as far off, is taken away.
  return 2 * bound


def _plain(
    prompts: PromptBatch, keys: Array, s: decode.SamplingSettings
) -> tuple[list, np.ndarray, np.ndarray]:
  """Responses, log-probs and kept mass; the whole row is run each token."""
  width = prompts.tokens_BP.shape[1]
  tokens = np.pad(prompts.tokens_BP, [(0, 0), (0, T)])
  mask = np.pad(prompts.mask_BP, [(0, 0), (0, T)])
  responses = [[] for _ in tokens]
  logprobs, mass = np.zeros((2, len(tokens), T)) + [[[0]], [[1]]]
  for t in range(T):
    states = _states(PARAMS, tokens, mask)[:, width + t - 1]
    drawn = sampling.sample(
        head_logits(states, PARAMS['embedding'], softcap=0.0),
        jnp.stack([jax.random.fold_in(key, t) for key in keys]),
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        banned_id=s.eos_id if t < s.min_new_tokens else -1,
    )
    for row, response in enumerate(responses):
      if s.eos_id in response:
        continue
      token, logprobs[row, t], mass[row, t] = (float(x[row]) for x in drawn)
      response.append(int(token))
      tokens[row, width + t], mask[row, width + t] = token, True
  return responses, logprobs, mass


@pytest.mark.parametrize(
    'settings', [SAMPLED, GREEDY, FILTERED], ids=['sampled', 'greedy', 'cut']
)
def test_equals_a_loop_without_a_cache(settings: decode.SamplingSettings):
  prompts = tiny.prompts(ROWS)
  rollout = _roll(prompts, settings)
  responses, logprobs, mass = _plain(prompts, _keys(prompts), settings)
  assert _responses(rollout) == responses
  close = functools.partial(
      np.testing.assert_allclose, rtol=0, atol=_rounding(rollout)
  )
  close(rollout.sample_logprobs_BT, logprobs)
  close(rollout.kept_mass_BT, mass)
  # Many different tokens, or a wrong row might pass.
  assert len({token for response in responses for token in response}) > 4


def test_eos_ends_a_row_and_pads_follow():
  rollout = _roll(tiny.prompts(ROWS))
  rows, lengths = rollout.sequences, []
  for row, response in enumerate(_responses(rollout)):
    length = len(response)
    lengths.append(length)
    ended = length < T or response[-1] == tiny.EOS
    assert response.count(tiny.EOS) == ended
    assert not ended or response[-1] == tiny.EOS
    tail = np.asarray(masking.response_tokens(rows))[row, length:]
    assert (tail == tiny.PAD).all()
    mask = np.asarray(rows.response_mask_BT)[row]
    assert mask.tolist() == [t < length for t in range(T)]
    assert not rollout.sample_logprobs_BT[row, length:].any()
    assert (rollout.kept_mass_BT[row, length:] == 1).all()
  # The seed shows both: rows that ended, and a row cut at the limit.
  assert min(lengths) < T
  assert any(tiny.EOS not in response for response in _responses(rollout))


def test_prompts_come_back_as_they_were():
  prompts = tiny.prompts(ROWS)
  rows = _roll(prompts).sequences
  width = tiny.PROMPT_LEN
  np.testing.assert_array_equal(rows.tokens_BL[:, :width], prompts.tokens_BP)
  np.testing.assert_array_equal(rows.mask_BL[:, :width], prompts.mask_BP)
  np.testing.assert_array_equal(rows.mask_BL[:, width:], rows.response_mask_BT)


def test_eos_waits_for_the_minimum_of_new_tokens():
  free = {len(r) for s in range(6) for r in _responses(_roll_seed(s, SAMPLED))}
  held = {len(r) for s in range(6) for r in _responses(_roll_seed(s, FILTERED))}
  assert min(free) <= 5  # the ban has something to do
  assert min(held) == 6  # five tokens and EOS


def _roll_seed(seed: int, settings: decode.SamplingSettings) -> Rollout:
  return _roll(tiny.prompts(ROWS), settings, seed)


def test_the_loop_stops_when_every_row_has_ended(
    monkeypatch: pytest.MonkeyPatch,
):
  prompts = tiny.prompts([1, 1, 1, 1])
  response = _responses(_roll(prompts, GREEDY))[0]
  eos = response[-1]
  length = response.index(eos) + 1
  assert 2 < length < T
  advanced, advance = [], decode._advance

  def counted(config, params, state):
    jax.debug.callback(lambda t: advanced.append(int(t)), state.t)
    return advance(config, params, state)

  monkeypatch.setattr(decode, '_advance', counted)
  settings = dataclasses.replace(GREEDY, eos_id=eos)
  run = jax.jit(
      lambda *args: decode.generate(*args, settings), static_argnums=0
  )
  rollout = run(tiny.SHAPE, PARAMS, prompts, _keys(prompts))
  assert _responses(rollout) == [response[:length]] * 4
  jax.effects_barrier()
  assert sorted(advanced) == list(range(1, length))  # not T - 1 times


def test_sample_logprobs_are_those_of_scoring():
  rollout = _roll(tiny.prompts(ROWS))
  logprobs, _ = _scored(PARAMS, rollout.sequences)
  np.testing.assert_allclose(
      rollout.sample_logprobs_BT, logprobs, rtol=0, atol=_rounding(rollout)
  )
  np.testing.assert_array_equal(rollout.kept_mass_BT, 1)  # nothing is cut


def test_row_order_changes_no_token():
  base = _responses(_roll(tiny.prompts(ROWS)))
  order = [2, 0, 3, 1]
  moved = _responses(_roll(tiny.prompts([ROWS[i] for i in order])))
  assert moved == [base[i] for i in order]


def test_neighbours_change_no_token():
  base = _responses(_roll(tiny.prompts(ROWS)))
  others = _responses(_roll(tiny.prompts([6, 1, 3, 4])))
  assert others[1] == base[1] and others[3] == base[3]
  fewer = _responses(_roll(tiny.prompts([ROWS[3], ROWS[0]])))
  assert fewer == [base[3], base[0]]


def test_more_padding_changes_no_token():
  wide = tiny.prompts(ROWS, width=tiny.PROMPT_LEN + 3)
  base = _roll(tiny.prompts(ROWS))
  moved = _roll(wide)
  assert _responses(moved) == _responses(base)
  np.testing.assert_allclose(
      moved.sample_logprobs_BT,
      base.sample_logprobs_BT,
      rtol=0,
      atol=_rounding(base),
  )


def test_what_padding_holds_changes_no_token():
  prompts = tiny.prompts(ROWS)
  other = jnp.where(prompts.mask_BP, prompts.tokens_BP, 17)
  moved = _roll(prompts.replace(tokens_BP=other))
  assert _responses(moved) == _responses(_roll(prompts))


def test_samples_of_one_prompt_differ_and_repeat():
  samples = tiny.prompts([1, 1, 1, 1], sample_ids=[0, 1, 2, 0])
  found = _responses(_roll(samples))
  assert found[0] == found[3]
  assert len(set(map(tuple, found))) == 3
  assert found[0] == _responses(_roll(tiny.prompts(ROWS)))[1]
  assert _responses(_roll(samples, seed=1))[0] != found[0]


def test_rows_are_cut_at_their_own_limit() -> None:
  prompts = tiny.prompts(ROWS)
  whole = _responses(_roll(prompts))
  limits = [1, 3, 5, T]
  cut = _roll(prompts.replace(limits_B=jnp.array(limits, jnp.int32)))
  want = [row[:limit] for row, limit in zip(whole, limits, strict=True)]
  assert _responses(cut) == want


def test_stages_end_at_halves_of_the_response() -> None:
  assert decode.stage_limits(512) == (64, 128, 256, 512)
  assert decode.stage_limits(128) == (64, 128)
  assert decode.stage_limits(64) == (64,)


@pytest.mark.slow
@pytest.mark.parametrize('unrolled', [False, True])
def test_stages_and_dropped_rows_change_no_token(
    monkeypatch: pytest.MonkeyPatch, unrolled: bool
) -> None:
  # Sixteen rows, which end at different tokens.
  prompts = tiny.prompts([0, 1, 2, 4] * 4)
  prompts = prompts.replace(
      sample_ids_B=jnp.repeat(jnp.arange(4, dtype=jnp.int32), 4)
  )
  whole = _roll(prompts)
  lengths = np.asarray(whole.sequences.response_mask_BT.sum(1))
  limits = (2, T // 2, T - 2, T)
  live = [(lengths > limit).sum() for limit in limits[:-1]]
  assert 16 > live[0] > live[1] > live[2] > 0 and live[2] <= 8, live
  sizes, extend = [], decode.extend

  def counted(config, params, state, *args):
    sizes.append(state.done_B.shape[0])
    return extend(config, params, state, *args)

  monkeypatch.setattr(decode, 'extend', counted)
  monkeypatch.setattr(decode, 'stage_limits', lambda _: limits)
  made = layout.make_layout(tiny.SHAPE, None)
  config = dataclasses.replace(made.config, unrolled=unrolled)
  made = dataclasses.replace(made, config=config)
  rollout = layout.sample_responses(
      PARAMS,
      prompts,
      jax.random.key(0),
      3,
      layout=made,
      settings=SAMPLED,
  )
  assert sorted(set(sizes)) == [2, 4, 8, 16]
  jax.tree.map(
      np.testing.assert_array_equal, rollout.sequences, whole.sequences
  )
  for name in ('sample_logprobs_BT', 'kept_mass_BT'):
    one, two = getattr(rollout, name), getattr(whole, name)
    np.testing.assert_allclose(one, two, rtol=0, atol=_rounding(whole))


def test_eight_bits_of_cache_are_nearly_the_same() -> None:
  prompts = tiny.prompts(ROWS)
  exact = _roll(prompts, GREEDY)
  near = _roll(prompts, dataclasses.replace(GREEDY, int8_cache=True))
  one, two = exact.sequences.tokens_BL, near.sequences.tokens_BL
  # The first token comes from the prompt alone, which is not quantised before
  # it is attended to; most of the others are the same.
  width = prompts.tokens_BP.shape[1]
  assert (one == two)[:, width:].mean() > 0.5
