"""One example of each stage, told from the arrays that the stage reads."""

from typing import Any

import numpy as np
import pytest

from ma_rlhf_jax.tools import layout
from ma_rlhf_jax.training.run import Run
from tests import tiny


def _run(**fields: Any) -> Run:
  return tiny.run('unused', tiny.config(**fields))


def _where(table: layout.Table, column: str) -> list[int]:
  """The columns of the array at which something is said."""
  return [i for i, text in enumerate(table.columns[column]) if text]


def test_sft_learns_the_response_and_nothing_else() -> None:
  # Row 0: a prompt of 3 tokens in 6 columns, a response of 5 in 8.
  table = layout.sft_table(_run(), 0)
  assert table.mask_L.tolist() == [False] * 3 + [True] * 8 + [False] * 3
  assert _where(table, 'learned') == [6, 7, 8, 9, 10]
  assert list(table.columns['position'])[3:11] == list('01234567')
  assert any('padded on the left by 3' in note for note in table.notes)
  assert any('BOS 1 time(s), in column [3]' in note for note in table.notes)
  assert any('EOS 1 time(s), in column [10]' in note for note in table.notes)


def test_sft_on_everything_shows_what_the_authors_learn() -> None:
  table = layout.sft_table(_run(sft__loss_on='everything'), 0)
  # Right-padded, and all columns but the first, pads too.
  assert table.mask_L.tolist() == [True] * 8 + [False] * 6
  assert _where(table, 'learned') == list(range(1, 14))


@pytest.mark.parametrize(
    ('loss', 'chosen', 'rejected'),
    [
        # Row 0 has 5 chosen and 6 rejected tokens, which differ from column 6
        # on; where a row has ended its end stands in.
        ('per_token', [6, 7, 8, 9, 10], [6, 7, 8, 9, 10, 11]),
        ('last_token', [10], [11]),
    ],
)
def test_the_reward_model_reads_what_its_loss_reads(
    loss: str, chosen: list[int], rejected: list[int]
) -> None:
  tables = layout.reward_model_tables(_run(reward_model__loss=loss), 0)
  assert [_where(t, 'loss') for t in tables] == [chosen, rejected]
  assert [_where(t, 'score') for t in tables] == [[10], [11]]


def test_ppo_shows_macro_actions_values_and_where_the_reward_lands() -> None:
  table = layout.ppo_table(_run(macro__ngram=2), 0)
  opens = [6, 8, 10]
  said = table.columns['macro action']
  assert [said[i] for i in range(6, 11)] == (
      ['0 opens', '0', '1 opens', '1', '2 opens']
  )
  assert [i for i, text in enumerate(said) if 'opens' in text] == opens
  # Each token's value is read one column to its left.
  assert _where(table, 'value') == [5, 6, 7, 8, 9]
  assert _where(table, 'kl') == [6, 7, 8, 9, 10]
  assert _where(table, 'score') == _where(table, 'reward') == [10]


def test_a_rule_of_probability_is_not_made_up() -> None:
  table = layout.ppo_table(_run(macro__termination='ppl'), 0)
  assert 'macro action' not in table.columns
  assert any('--model=FOLDER' in note for note in table.notes)


def test_text_shows_each_real_token_and_sums_up_padding() -> None:
  run = _run()
  table = layout.sft_table(run, 3)  # 5 prompt tokens, 1 response token
  text = layout.describe(run, table)
  lines = text.splitlines()
  assert lines[0] == 'SFT, row 3'
  assert lines[1].split()[:4] == ['column', 'id', 'token', 'mask']
  assert any(line.startswith('7-13 ') and '<pad>' in line for line in lines)
  shown = [line for line in lines if "'" in line or '<eos>' in line]
  assert len(shown) == int(np.sum(table.mask_L)) - 1  # BOS is no text


def test_a_row_that_is_not_there_is_named() -> None:
  with pytest.raises(ValueError, match='--row=8: the sft part has 8 rows'):
    layout.sft_table(_run(), 8)
  with pytest.raises(ValueError, match='--row=-1 must be at least 0'):
    layout.show(tiny.config(), -1)


def test_the_stages_of_the_config_are_shown() -> None:
  run = _run(stages=('sft', 'reward_model', 'ppo'))
  titles = [table.title.split(',')[0] for table in layout.tables(run, 0)]
  assert titles == ['SFT', 'Reward model', 'Reward model', 'PPO']
  (only,) = layout.tables(_run(stages=('ppo',)), 0)
  assert only.title == 'PPO, row 0'
