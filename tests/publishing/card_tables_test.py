"""Tables of a card, and text that cannot break out of them."""

import json
import pathlib
from typing import Any

from etils import epath
import pytest

from ma_rlhf_jax.config import fingerprint
from ma_rlhf_jax.publishing import card_tables
from tests import tiny
from tests.products import COMPARISON


@pytest.mark.parametrize(
    'value, want',
    [
        ('plain-name_1.0', r'plain-name\_1.0'),
        ('a|b', r'a\|b'),
        ('[x](http://y)', r'\[x\](http://y)'),
        ('<script>', r'\<script\>'),
        ('one\n## two\r\n\tthree', 'one ## two three'),
        ('`code` *x* ~~y~~ &lt;', r'\`code\` \*x\* \~\~y\~\~ \&lt;'),
        ('a\x00\x1b\u202eb', 'a???b'),
        ('\\', '\\\\'),
        ((1, 2), '(1, 2)'),
    ],
)
def test_text_is_one_line_without_markup(value: Any, want: str) -> None:
  assert card_tables.plain(value) == want


def test_a_table_escapes_its_cells() -> None:
  assert card_tables.table(('a', ''), [('x|y', 1), ('', 'z\nw')]) == (
      '| a |  |\n| --- | --- |\n| x\\|y | 1 |\n|  | z w |'
  )


def test_settings_are_those_of_the_stage() -> None:
  config = tiny.config(ppo__kl_coef=0.125)
  ppo = card_tables.settings(config, 'ppo')
  assert '| ppo.kl\\_coef | 0.125 |' in ppo and '| macro.ngram | 5 |' in ppo
  assert 'lora' not in ppo and 'sft.' not in ppo
  assert ppo.endswith(f'| SHA-256 of all fields | {fingerprint(config)} |')
  sft = card_tables.settings(tiny.config(lora__rank=4), 'sft')
  assert '| lora.rank | 4 |' in sft and 'ppo' not in sft
  other = tiny.config(macro__termination='ppl')
  assert 'macro.ngram' not in card_tables.settings(other, 'critic')


def _workdir(tmp_path: pathlib.Path, **rows: list[dict]) -> epath.Path:
  for stage, lines in rows.items():
    (tmp_path / stage / 'metrics').mkdir(parents=True)
    text = ''.join(json.dumps({'stage': stage} | x) + '\n' for x in lines)
    (tmp_path / stage / 'metrics' / '0001-0001.jsonl').write_text(text)
  return epath.Path(tmp_path)


def test_the_last_evaluation_is_shown(tmp_path: pathlib.Path) -> None:
  workdir = _workdir(
      tmp_path,
      sft=[
          {'step': 0, 'eval/loss': 3.0},
          {'step': 2, 'eval/loss': 0.123456, 'loss/sft': 9.0},
          {'step': 3, 'loss/sft': 8.0},
      ],
      ppo=[{'step': 4, 'critic/value': 2.0, 'critic/lr': 0.1}],
  )
  assert list(card_tables.metrics(workdir, 'sft')) == [
      'After update 2:',
      '| metric | value |\n| --- | --- |\n| eval/loss | 0.1235 |',
  ]
  assert list(card_tables.metrics(workdir, 'critic'))[1].endswith(
      '| --- | --- |\n| critic/value | 2 |'
  )
  assert not list(card_tables.metrics(workdir, 'ppo'))
  assert not list(card_tables.metrics(workdir, 'reward_model'))


def test_the_comparison_is_shown_with_its_policy(
    tmp_path: pathlib.Path,
) -> None:
  (tmp_path / 'evaluate').mkdir()
  path = tmp_path / 'evaluate' / 'comparison.json'
  path.write_text(json.dumps(COMPARISON))
  workdir = epath.Path(tmp_path)
  _, found = card_tables.metrics(workdir, 'ppo')
  cell = '4.500 (4.250 to 4.750)'
  assert found.split('\n')[2:] == [
      f'| kl | 0.000 (0.000 to 0.000) | {cell} | {cell} |',
      '| win rate by gold |  | 0.750 (0.500 to 1.000) |  |',
  ]
  assert not list(card_tables.metrics(workdir, 'sft'))


def test_the_check_leaves_out_who_did_not_read() -> None:
  ours = {'max_logit_difference': 0.0, 'top1_agreement': 0.875}
  receipt = {'readers': {'ma_rlhf_jax': ours, 'transformers': None}}
  assert card_tables.check(receipt).split('\n') == [
      '| read by | max logit difference | top1 agreement |',
      '| --- | --- | --- |',
      '| ma\\_rlhf\\_jax | 0 | 0.875 |',
  ]
