"""`--config.help`, and the page of all fields."""

import subprocess
import sys

import pytest

from ma_rlhf_jax.commands import command, config_help, tools, verbs
from ma_rlhf_jax.config_fields import BLOCKS, FIELDS
from tests import helped

_COMMANDS = (verbs.TRAIN, tools.PLAN, tools.BENCH, tools.EXPLORE, tools.LAYOUT)


def test_all_fields_are_printed_in_lines_of_80_characters() -> None:
  text = config_help.text()
  assert max(map(len, text.splitlines())) <= 80
  for name, field in FIELDS.items():
    name = name.replace('from_run', 'from')
    assert f'\n  --config.{name}={field.default!r}\n' in text
  for name, block in BLOCKS.items():
    assert f'\n\n{name}: {block.title}\n' in text


def test_a_field_says_all_of_itself() -> None:
  assert config_help.text('model.logprob_chunk').split('\n\n')[1] == (
      f'model: {BLOCKS["model"].title}\n'
      '  --config.model.logprob_chunk=0\n'
      '      Tokens per chunk of the vocabulary head, which bounds the logits '
      'that a\n'
      '      device holds at once; 0 = auto. At least 0. May change on resume.'
  )
  text = ' '.join(config_help.text('ppo.ratio').split())
  assert 'One of token, macro, geometric. Source: authors.' in text


@pytest.mark.parametrize(
    ('asked', 'printed'),
    [
        ('critic', {f'critic.{name}' for name in BLOCKS['critic'].fields}),
        ('run', {'seed', 'stages', 'reward'}),
        ('seed', {'seed'}),
        ('ppo.optim', {n for n in FIELDS if n.startswith('ppo.optim.')}),
        ('ppo.from', {'ppo.from'}),
    ],
)
def test_a_block_is_printed_alone(asked: str, printed: set[str]) -> None:
  lines = config_help.text(asked).splitlines()
  names = [
      line[11:].partition('=')[0] for line in lines if '  --config.' in line
  ]
  assert set(names) == printed and len(names) == len(printed)


def test_a_block_that_is_not_there_names_those_that_are() -> None:
  with pytest.raises(ValueError) as caught:
    config_help.text('nonsense')
  assert str(caught.value).startswith('--config.help=nonsense: there is no')
  assert all(name in str(caught.value) for name in BLOCKS)


@pytest.mark.parametrize('of', _COMMANDS, ids=lambda of: of.name)
@pytest.mark.parametrize('word', ['--config.help=ppo', '-config.help=ppo'])
def test_a_command_that_takes_a_config_answers(
    of: command.Command,
    word: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  words = ['command', '--config', 'configs/tiny.py', '--config.seed=1', word]
  monkeypatch.setattr(sys, 'argv', words)
  with pytest.raises(SystemExit) as ended:
    command.answer(of)
  assert ended.value.code == 0
  assert capsys.readouterr().out == config_help.text('ppo') + '\n'
  monkeypatch.setattr(sys, 'argv', ['command', '--config.help=nonsense'])
  with pytest.raises(SystemExit) as ended:
    command.answer(of)
  assert ended.value.code.startswith('error: --config.help=nonsense')


def test_it_is_answered_before_anything_heavy_is_imported() -> None:
  assert helped.run('ma_rlhf_jax.train', '--config.help') == (
      config_help.text() + '\n'
  )
  done = subprocess.run(
      [sys.executable, '-m', 'ma_rlhf_jax.train', '--config.help=nonsense'],
      cwd=helped.ROOT,
      capture_output=True,
      text=True,
      timeout=60,
  )
  assert done.returncode == 1 and 'the blocks are run, model' in done.stderr


def test_the_page_is_the_one_that_the_fields_make() -> None:
  path = helped.ROOT / 'ma_rlhf_jax' / 'configuration.md'
  assert path.read_text() == config_help.page(), (
      'python -m ma_rlhf_jax.commands.config_help > '
      'ma_rlhf_jax/configuration.md'
  )
