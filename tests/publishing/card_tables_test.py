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
      reward_model=[],
  )
  config = tiny.config(data__eval_rows=12, ppo__batch_size=8)
  found = lambda stage: list(card_tables.metrics(config, workdir, stage))
  assert found('sft') == [
      'After update 2, on at most 12 held-out rows:',
      '| metric | value |\n| --- | --- |\n| eval/loss | 0.1235 |',
  ]
  assert found('critic') == [
      'After update 4:',
      '| metric | value |\n| --- | --- |\n| critic/value | 2 |',
  ]
  assert not found('ppo') and not found('reward_model')


def test_the_evaluation_of_ppo_says_on_how_many_prompts(
    tmp_path: pathlib.Path,
) -> None:
  workdir = _workdir(tmp_path, ppo=[{'step': 4, 'eval/score': 1.5}])
  config = tiny.config(data__eval_rows=12, ppo__batch_size=8)
  words, _ = card_tables.metrics(config, workdir, 'ppo')
  assert words == 'After update 4, on at most 8 held-out prompts:'


def _compared(tmp_path: pathlib.Path, **files: dict) -> list[str]:
  """The sections of a card of PPO with those files in `evaluate/`."""
  (tmp_path / 'evaluate').mkdir(exist_ok=True)
  for name, content in files.items():
    path = tmp_path / 'evaluate' / f'{name.replace("__", "-prompts=")}.json'
    path.write_text(json.dumps(content))
  workdir = epath.Path(tmp_path)
  assert not list(card_tables.metrics(tiny.config(), workdir, 'sft'))
  return list(card_tables.metrics(tiny.config(), workdir, 'ppo'))


def test_the_comparison_is_shown_with_its_prompts_and_settings(
    tmp_path: pathlib.Path,
) -> None:
  words, found = _compared(tmp_path, comparison=COMPARISON)
  assert words == (
      'On 12 held-out prompts (evaluate.prompts = 256, evaluate.temperature = '
      '1), mean and 95 % interval, differences paired by prompt:'
  )
  cell = '4.500 (4.250 to 4.750)'
  assert found.split('\n')[2:] == [
      f'| kl | 0.000 (0.000 to 0.000) | {cell} | {cell} |',
      '| win rate by gold |  | 0.750 (0.500 to 1.000) |  |',
  ]


def test_comparisons_of_other_settings_are_no_result_of_the_run(
    tmp_path: pathlib.Path,
) -> None:
  few = COMPARISON | {'prompts': 3, 'settings': {'evaluate.prompts': 3}}
  words, _ = _compared(tmp_path, comparison__3=few)
  assert words.startswith('On 3 held-out prompts (evaluate.prompts = 3), ')
  words, _ = _compared(tmp_path, comparison=COMPARISON)
  assert words.startswith('On 12 held-out prompts')


def test_a_comparison_of_an_earlier_version_claims_no_number(
    tmp_path: pathlib.Path,
) -> None:
  words, found = _compared(tmp_path, comparison=COMPARISON['rows'])
  assert words.startswith('On an unrecorded number of held-out prompts, mean')
  assert '| win rate by gold |' in found


def test_the_check_leaves_out_who_did_not_read() -> None:
  ours = {'max_logit_difference': 0.0, 'top1_agreement': 0.875}
  receipt = {'readers': {'ma_rlhf_jax': ours, 'transformers': None}}
  assert card_tables.check(receipt).split('\n') == [
      '| read by | max logit difference | top1 agreement |',
      '| --- | --- | --- |',
      '| ma\\_rlhf\\_jax | 0 | 0.875 |',
  ]
