"""The help of a command, and when a command line asks for it."""

import sys

import pytest

from ma_rlhf_jax import __version__
from ma_rlhf_jax.commands import command
from ma_rlhf_jax.commands.command import Command, Flag

_FLAGS = (
    Flag('name', 'WORD', 'The name.'),
    Flag('size', 'TOKENS', 'The size.', 0),
    Flag('fast', '', 'Goes fast.', False),
)
_COMMAND = Command('evaluate', _FLAGS, ("--name='a b'", '--size=1'))


@pytest.mark.parametrize(
    ('words', 'asked'),
    [
        ('', ''),
        ('--help', 'help'),
        ('-h', 'help'),
        ('--name=x --fast --help', 'help'),
        ('--fast -h', 'help'),
        ('--version', 'version'),
        # Values, and what follows the flags.
        ('--name --help', ''),
        ('-name -h', ''),
        ('--name --name --help', 'help'),
        ('--name=--help', ''),
        ('-- --help', ''),
        ('--helpful', ''),
    ],
)
def test_help_and_version_are_asked_for_by_a_word_of_their_own(
    words: str, asked: str
) -> None:
  assert command._asked(_COMMAND, words.split()) == asked


def test_a_flag_shows_its_value_its_unit_and_its_default() -> None:
  texts = [flag.text() for flag in _FLAGS]
  assert texts == [
      '  --name=WORD\n      The name.',
      '  --size=TOKENS\n      The size. Default: 0.',
      '  --fast\n      Goes fast. Default: off.',
  ]
  said = Flag('n', 'N', 'The number.', -1, 'as many as fit')
  assert said.text().endswith('The number. Default: as many as fit.')


def test_a_long_example_is_broken_where_a_shell_reads_on() -> None:
  text = 'x' * 50 + " --text='" + 'a b ' * 10 + "'"
  want = '  ' + 'x' * 50 + " \\\n    --text='" + 'a b ' * 10 + "'"
  assert command._example(text) == want


def test_the_version_ends_the_command(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(sys, 'argv', ['evaluate', '--version'])
  with pytest.raises(SystemExit) as ended:
    command.answer(_COMMAND)
  assert ended.value.code == 0
  assert capsys.readouterr().out == f'ma_rlhf_jax {__version__}\n'
  monkeypatch.setattr(sys, 'argv', ['evaluate', '--name=x'])
  command.answer(_COMMAND)  # and nothing else does


def test_the_text_begins_with_the_docstring_of_the_module() -> None:
  lines = _COMMAND.text().splitlines()
  assert lines[0] == 'usage: python -m ma_rlhf_jax.evaluate [flags]'
  assert lines[2].startswith('Compares SFT and PPO policies')
