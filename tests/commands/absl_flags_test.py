"""The flags of a table, as absl reads them."""

from absl import flags
import pytest

from ma_rlhf_jax.commands import absl_flags
from ma_rlhf_jax.commands.command import Flag

_TABLE = (
    Flag('name', 'WORD', 'A.', 'x'),
    Flag('size', 'N', 'B.', 3, least=1),
    Flag('share', 'X', 'C.', kind=float),
    Flag('fast', '', 'D.', False),
    Flag('pair', 'A,B', 'E.', '1,2', kind=list),
    Flag('text', 'T', 'F.', ()),
    Flag('color', 'on|off', 'G.', 'on', kind=('on', 'off')),
)


def _parsed(*arguments: str) -> dict:
  values = flags.FlagValues()
  absl_flags.define(_TABLE, values)
  values(['command', *arguments])
  return {flag.name: values[flag.name].value for flag in _TABLE}


def test_every_kind_has_its_default_and_its_values() -> None:
  default = {'name': 'x', 'size': 3, 'share': None, 'fast': False}
  default |= {'pair': ['1', '2'], 'text': [], 'color': 'on'}
  assert _parsed() == default
  arguments = '--name=y --size=1 --share=.5 --fast --pair=3 --color=off'
  assert _parsed(*arguments.split(), '--text=a,b', '--text=c') == {
      'name': 'y',
      'size': 1,
      'share': 0.5,
      'fast': True,
      'pair': ['3'],
      'text': ['a,b', 'c'],
      'color': 'off',
  }


@pytest.mark.parametrize('word', ['--size=0', '--color=red', '--share=x'])
def test_what_a_flag_cannot_be_is_an_error(word: str) -> None:
  with pytest.raises(flags.Error):
    _parsed(word)


def test_a_wrong_flag_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
  values = flags.FlagValues()
  absl_flags.define(_TABLE, values)
  monkeypatch.setattr(flags, 'FLAGS', values)
  with pytest.raises(SystemExit) as ended:
    absl_flags.parse(['command', '--sise=2'])
  assert str(ended.value).startswith("error: Unknown command line flag 'sise'")
  assert '\n' not in str(ended.value)
