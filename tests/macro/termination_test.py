"""Where macro actions start."""

import dataclasses
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.structs import Scored

SETTINGS = termination.TerminationSettings(
    termination='fixed', ngram=3, random_lengths=(2, 3), random_repeats=1
)
# Row 1 is padded on the left as well; row 2 has no token.
MASK = np.array(
    [[1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0], [0] * 7, [1] * 7], bool
)
segment = jax.jit(termination.segment, static_argnums=1)
fixed = jax.jit(termination.fixed, static_argnames='ngram')
randomised = jax.jit(
    termination.randomised, static_argnames=('lengths', 'repeats')
)
ppl = jax.jit(termination.ppl)
ppl_adjacent = jax.jit(termination.ppl_adjacent)


def _inputs(padding: float = 0.0) -> termination.TerminationInputs:
  logprobs = -np.random.default_rng(5).exponential(size=MASK.shape)
  return termination.TerminationInputs(
      mask_BT=jnp.asarray(MASK),
      logprobs_BT=jnp.asarray(np.where(MASK, logprobs, padding), 'float32'),
      keys_B=jax.random.split(jax.random.key(7), len(MASK)),
  )


def _settings(rule: str) -> termination.TerminationSettings:
  return dataclasses.replace(SETTINGS, termination=rule)


def test_fixed_opens_every_n_real_tokens():
  starts = fixed(MASK, ngram=3)
  assert starts.astype(int).tolist() == [
      [1, 0, 0, 1, 0, 0, 0],
      [0, 1, 0, 0, 1, 0, 0],
      [0, 0, 0, 0, 0, 0, 0],
      [1, 0, 0, 1, 0, 0, 1],
  ]


@pytest.mark.parametrize('ngram', [0, 7, 1_000_000])
def test_infinite_n_is_one_macro_action_per_response(ngram: int):
  starts = fixed(MASK, ngram=ngram)
  assert starts.astype(int).tolist() == [
      [1, 0, 0, 0, 0, 0, 0],
      [0, 1, 0, 0, 0, 0, 0],
      [0, 0, 0, 0, 0, 0, 0],
      [1, 0, 0, 0, 0, 0, 0],
  ]


def test_one_token_macro_actions_open_everywhere():
  starts = fixed(MASK, ngram=1)
  np.testing.assert_array_equal(starts, MASK)


def test_given_lengths_are_consumed_in_order_and_the_rest_is_one():
  lengths = np.array([[3, 1], [1, 2], [2, 2], [2, 1]])
  starts = jax.jit(termination.from_lengths)(MASK, lengths)
  assert starts.astype(int).tolist() == [
      [1, 0, 0, 1, 1, 0, 0],  # 3, 1, rest 2
      [0, 1, 1, 0, 1, 0, 0],  # 1, 2, rest 1
      [0, 0, 0, 0, 0, 0, 0],
      [1, 0, 1, 1, 0, 0, 0],  # 2, 1, rest 4
  ]


def test_randomised_uses_each_length_as_often_as_asked():
  mask = jnp.ones((5, 40), bool)
  keys = jax.random.split(jax.random.key(3), 5)
  starts = randomised(mask, keys, lengths=(2, 3, 7), repeats=2)
  orders = set()
  for row in np.asarray(starts):
    lengths = np.diff(np.flatnonzero(np.append(row, True)))
    # 2 + 2 + 3 + 3 + 7 + 7 = 24 tokens of 40; the last 16 are one.
    assert sorted(lengths[:-1].tolist()) == [2, 2, 3, 3, 7, 7]
    assert lengths[-1] == 16
    orders.add(tuple(lengths))
  assert len(orders) > 1  # each row has its own order


def test_randomised_depends_on_the_key_of_the_row_only():
  mask = jnp.ones((5, 40), bool)
  keys = jax.random.split(jax.random.key(4), 5)
  rule = lambda keys: randomised(mask, keys, lengths=(2, 3, 7), repeats=2)
  np.testing.assert_array_equal(rule(keys)[::-1], rule(keys[::-1]))


def test_ppl_opens_where_the_mean_nll_would_rise():
  # nll  2, 1 (mean 1.5), 1.5 is a tie, 1.75 > 1.5 opens, .5 joins, mean 1.125,
  #      1.25 > 1.125 opens
  logprobs = -np.array([[2, 1, 1.5, 1.75, 0.5, 1.25, math.nan]])
  mask = np.array([[True] * 6 + [False]])
  starts = ppl(logprobs, mask)
  assert starts.astype(int).tolist() == [[1, 0, 0, 1, 0, 1, 0]]


def test_ppl_adjacent_opens_where_a_token_is_worse_than_the_one_before():
  # nll  2, 1 no, 1 tie, 1.75 yes, .5 no, 1.25 yes
  logprobs = -np.array([[2, 1, 1, 1.75, 0.5, 1.25, math.nan]])
  mask = np.array([[True] * 6 + [False]])
  starts = ppl_adjacent(logprobs, mask)
  assert starts.astype(int).tolist() == [[1, 0, 0, 1, 0, 1, 0]]


@pytest.mark.parametrize('nll', [0.1, 0.7, 1 / 3, 11.3])
def test_equal_log_probs_never_cut(nll: float):
  mask = np.ones((1, 300), bool)
  logprobs = np.full((1, 300), -nll, np.float32)
  for rule in (ppl, ppl_adjacent):
    starts = np.flatnonzero(rule(logprobs, mask))
    assert starts.tolist() == [0]


def test_ppl_equals_a_loop_over_perplexities():
  rng = np.random.default_rng(0)
  logprobs = -rng.exponential(size=(3, 40))
  mask = np.arange(40)[None] < np.array([40, 23, 1])[:, None]

  def loop(row: np.ndarray) -> list[int]:
    starts, current = [], []
    perplexity = lambda tokens: math.exp(-sum(tokens) / len(tokens))
    for logprob in row:
      opens = not current or (
          perplexity([*current, logprob]) > perplexity(current)
      )
      current = [logprob] if opens else [*current, logprob]
      starts.append(int(opens))
    return starts

  with jax.enable_x64(True):
    got = np.asarray(ppl(logprobs, mask))
  for row, row_mask, starts in zip(logprobs, mask, got, strict=True):
    want = loop(row[row_mask])
    assert starts.astype(int).tolist() == want + [0] * (40 - len(want))


def test_macro_actions_number_the_real_tokens():
  starts = np.array(
      [
          [0, 0, 1, 0, 1, 0, 1],  # first token opens unasked, padding never
          [1, 0, 0, 1, 0, 1, 1],
          [1, 0, 0, 0, 0, 0, 1],
          [1, 1, 0, 0, 0, 0, 1],
      ],
      bool,
  )
  macro = jax.jit(termination.macro_actions)(starts, MASK)
  assert macro.ids_BT.tolist() == [
      [0, 0, 1, 1, 2, 2, 7],
      [7, 0, 0, 1, 1, 7, 7],
      [7, 7, 7, 7, 7, 7, 7],
      [0, 1, 1, 1, 1, 1, 2],
  ]
  assert macro.starts_BT.astype(int).tolist() == [
      [1, 0, 1, 0, 1, 0, 0],
      [0, 1, 0, 1, 0, 0, 0],
      [0, 0, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0, 1],
  ]
  assert macro.ids_BT.dtype == jnp.int32


@pytest.mark.parametrize('rule', termination.RULES)
def test_every_token_is_in_one_macro_action_and_none_is_empty(rule: str):
  macro = segment(_inputs(), _settings(rule))
  np.testing.assert_array_equal(macro.mask_BT, MASK)
  for ids, starts, mask in zip(
      np.asarray(macro.ids_BT), np.asarray(macro.starts_BT), MASK, strict=True
  ):
    assert (ids[~mask] == 7).all()
    steps = np.diff(ids[mask], prepend=-1)
    assert set(steps.tolist()) <= {0, 1}
    assert steps[:1].tolist() in ([], [1])
    np.testing.assert_array_equal(starts[mask], steps == 1)


@pytest.mark.parametrize('rule', termination.RULES)
def test_padding_and_row_order_do_not_matter(rule: str):
  macro = segment(_inputs(), _settings(rule))
  nan = segment(_inputs(math.nan), _settings(rule))
  order = np.array([2, 0, 3, 1])
  shuffled = jax.tree.map(lambda x: x[order], _inputs())
  moved = segment(shuffled, _settings(rule))
  np.testing.assert_array_equal(nan.ids_BT, macro.ids_BT)
  np.testing.assert_array_equal(moved.ids_BT, macro.ids_BT[order])


@pytest.mark.parametrize('rule', termination.RULES)
def test_jit_and_plain_agree(rule: str):
  macro = segment(_inputs(), _settings(rule))
  plain = termination.segment(_inputs(), _settings(rule))
  np.testing.assert_array_equal(plain.ids_BT, macro.ids_BT)
  np.testing.assert_array_equal(plain.starts_BT, macro.starts_BT)


def test_the_mask_must_be_bool():
  with pytest.raises(AssertionError):
    termination.fixed(jnp.ones((2, 3), jnp.int32), ngram=2)


from_lengths = jax.jit(termination.from_lengths, static_argnames='leftover')
low_probability = jax.jit(
    termination.low_probability,
    static_argnames=('cut_probability', 'cut_count'),
)
bounded = jax.jit(termination.bounded, static_argnames=('min_len', 'max_len'))


def _row(text: str) -> np.ndarray:
  """'1 0 1' -> a row of bools."""
  return np.array([[char == '1' for char in text.split()]])


@pytest.mark.parametrize(
    ('leftover', 'want'),
    [
        # 2 + 3, then all the rest
        ('one', '1 0 1 0 0 1 0 0 0 0 0 0'),
        # 2 + 3 + 2 + 3 + 2
        ('cycle', '1 0 1 0 0 1 0 1 0 0 1 0'),
    ],
)
def test_what_the_list_leaves_is_one_or_more_of_the_list(
    leftover: str, want: str
):
  mask = np.ones((1, 12), bool)
  got = from_lengths(mask, np.array([[2, 3]]), leftover=leftover)
  np.testing.assert_array_equal(got, _row(want))


def test_every_second_improbable_token_opens():
  # Below .5: columns 1 2 4 5; every second of them opens.
  logprobs = np.log([[0.9, 0.4, 0.1, 0.5, 0.2, 0.3, 0.1]])
  mask = _row('1 1 1 1 1 1 0')
  got = low_probability(logprobs, mask, cut_probability=0.5, cut_count=2)
  np.testing.assert_array_equal(got, _row('0 0 1 0 0 1 0'))
  got = low_probability(logprobs, mask, cut_probability=0.5, cut_count=1)
  np.testing.assert_array_equal(got, _row('0 1 1 0 1 1 0'))


@pytest.mark.parametrize(
    ('starts', 'min_len', 'max_len', 'want'),
    [
        # Too early: the third token may open, the second may not.
        ('1 1 1 0 0 0 0', 2, 0, '1 0 1 0 0 0 0'),
        # Too late.
        ('1 0 0 0 0 0 0', 1, 3, '1 0 0 1 0 0 1'),
        # The last start would leave one token.
        ('1 0 0 1 0 0 1', 2, 0, '1 0 0 1 0 0 0'),
        # 7 = 4 + 3, not 5 + 2.
        ('1 0 0 0 0 0 0', 3, 5, '1 0 0 0 1 0 0'),
        # Shorter than the minimum.
        ('1 1 1 1 1 1 1', 8, 0, '1 0 0 0 0 0 0'),
    ],
)
def test_bounds_by_hand(starts: str, min_len: int, max_len: int, want: str):
  mask = np.ones((1, 7), bool)
  got = bounded(_row(starts), mask, min_len=min_len, max_len=max_len)
  np.testing.assert_array_equal(got, _row(want))


@pytest.mark.parametrize(
    ('min_len', 'max_len'), [(1, 0), (1, 1), (2, 3), (3, 5), (4, 7), (3, 0)]
)
def test_every_length_keeps_the_bounds(min_len: int, max_len: int):
  rng = np.random.default_rng(min_len)
  mask = np.arange(29)[None] < np.arange(60)[:, None] % 30
  starts = rng.random(mask.shape) < 0.3
  got = bounded(starts, mask, min_len=min_len, max_len=max_len)
  macro = jax.device_get(jax.jit(termination.macro_actions)(got, mask))
  np.testing.assert_array_equal(macro.starts_BT, got)
  for row, real in enumerate(mask.sum(axis=1)):
    lengths = np.bincount(macro.ids_BT[row, :real])
    assert lengths.sum() == real
    if real >= min_len:
      assert lengths.min(initial=99) >= min_len
    assert lengths.max(initial=0) <= (max_len or 99)
  if (min_len, max_len) == (1, 0):
    first = mask & (np.arange(29)[None] == 0)
    np.testing.assert_array_equal(got, mask & (starts | first))


def test_bounds_that_leave_gaps_are_refused():
  with pytest.raises(ValueError, match='max_len=4 must be 0 or at least 5'):
    termination.bounded(MASK, MASK, min_len=3, max_len=4)


def test_given_starts_stand_for_the_rule_and_are_bounded_too():
  mask = np.ones((1, 6), bool)
  inputs = termination.TerminationInputs(
      mask,
      jnp.zeros((1, 6)),
      jax.random.split(jax.random.key(0), 1),
      host_starts_BT=_row('0 1 1 0 0 0'),
  )
  settings = termination.TerminationSettings('parsing', min_len=2)
  macro = segment(inputs, settings)
  assert macro.ids_BT.tolist() == [[0, 0, 1, 1, 1, 1]]


# Field of `macro` -> a value that is not the default.
_SETTINGS: dict[str, Any] = {
    'termination': 'ppl',
    'ngram': 3,
    'random_lengths': (1, 4),
    'random_repeats': 2,
    'random_leftover': 'cycle',
    'cut_probability': 0.7,
    'cut_count': 3,
    'min_len': 2,
    'max_len': 9,
    'last_token_alone': True,
    'empty_step': True,
    'logprobs': 'old',
}


@pytest.mark.parametrize('field', _SETTINGS)
def test_a_setting_is_read_from_the_config(field: str):
  config, read = config_lib.base(), termination.TerminationSettings.from_config
  default = read(config.macro)
  config.macro[field] = _SETTINGS[field]
  assert getattr(default, field) != _SETTINGS[field]
  changed = {field: _SETTINGS[field]}
  assert read(config.macro) == dataclasses.replace(default, **changed)


def test_settings_are_static_arguments():
  fields = dataclasses.fields(termination.TerminationSettings)
  assert [field.name for field in fields] == list(_SETTINGS)
  config = config_lib.base()
  config.macro.random_lengths = [1, 4]  # as JSON has it
  one, two = (
      termination.TerminationSettings.from_config(config.macro)
      for _ in range(2)
  )
  assert one.random_lengths == (1, 4) and hash(one) == hash(two) and one == two


def test_rules_of_probability_and_of_the_user_ask_the_models():
  asks = {
      name: termination.TerminationSettings(name).asks_models
      for name in (*termination.RULES, 'parsing', 'my_rules:cut')
  }
  assert {name for name, does in asks.items() if does} == {
      *('ppl', 'ppl_adjacent', 'ppl_authors', 'low_probability'),
      'my_rules:cut',
  }


def test_a_rule_of_the_user_sees_what_the_models_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  (tmp_path / 'value_rules.py').write_text(
      'def high_value(inputs, settings):\n'
      '  return inputs.scored.values_BT > settings.cut_probability\n'
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, 'value_rules', raising=False)
  mask = jnp.array([[True, True, True, False]])
  inputs = termination.TerminationInputs(
      mask,
      jnp.zeros((1, 4)),
      jax.random.split(jax.random.key(0), 1),
      scored=Scored(values_BT=jnp.array([[0.5, 0.8, 0.6, 0.9]])),
  )
  settings = termination.TerminationSettings(
      'value_rules:high_value', cut_probability=0.7
  )
  assert segment(inputs, settings).ids_BT.tolist() == [[0, 1, 1, 4]]
