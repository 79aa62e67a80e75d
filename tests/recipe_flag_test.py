"""The flag --config: recipes, their arguments, and fields."""

from collections.abc import Iterator
import pathlib

from absl import flags
from ml_collections import ConfigDict
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import recipe_flag
from ma_rlhf_jax.config import flatten
from ma_rlhf_jax.training import automatic

_ROOT = pathlib.Path(__file__).parents[1]
_TINY = f'--config={_ROOT / "configs" / "tiny.py"}'


@pytest.fixture(autouse=True)
def clean_flags() -> Iterator[None]:
  """Flags of fields belong to one command line."""
  yield
  for name in [name for name in flags.FLAGS if name.startswith('config.')]:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


def _parsed(*arguments: str) -> ConfigDict:
  recipe_flag.parse(['command', *arguments])
  return recipe_flag.CONFIG.value


def _message(*arguments: str) -> str:
  """What a command line that cannot be read ends with."""
  with pytest.raises(SystemExit) as caught:
    _parsed(*arguments)
  assert isinstance(caught.value.code, str)
  assert 'Traceback' not in caught.value.code
  return caught.value.code


def test_fields_and_recipe_arguments_are_set() -> None:
  config = _parsed(
      f'{_TINY}:ngram=3', '--config.ppo.kl_coef=0.125', '--config.seed', '7'
  )
  assert (config.macro.ngram, config.ppo.kl_coef, config.seed) == (3, 0.125, 7)


def test_the_last_value_of_a_tuple_counts_as_that_of_a_number() -> None:
  config = _parsed(
      _TINY,
      '--config.macro.random_lengths=(2,3)',
      '--config.seed=1',
      '--config.log.sinks',
      "('wandb',)",
      '-config.macro.random_lengths',
      '(7,)',
      "--config.log.sinks=('jsonl',)",
      '--config.seed=2',
  )
  assert config.macro.random_lengths == (7,)
  assert config.log.sinks == ('jsonl',) and config.seed == 2


def test_without_config_the_default_recipe_is_taken() -> None:
  config = _parsed('--config.ppo.kl_coef=0.125')
  assert config.ppo.kl_coef == 0.125
  default = pathlib.Path(config_lib.default_recipe())
  assert default == _ROOT / 'configs' / 'tiny.py'
  assert config.sft.optim.lr == _parsed(_TINY).sft.optim.lr


@pytest.mark.parametrize(
    'arguments',
    [
        [_TINY, '--config.ppo.from=DIR'],
        [_TINY, '-config.ppo.from', 'DIR'],
        [_TINY, '--config.ppo.from_run=DIR'],
        ['--config.ppo.from=DIR'],
    ],
)
def test_from_is_the_spelling_of_from_run(arguments: list[str]) -> None:
  assert _parsed(*arguments).ppo.from_run == 'DIR'


def test_auto_is_a_value_of_numbers_that_know_it() -> None:
  set_to = [f'--config.{name}=auto' for name in automatic.FIELDS]
  changed = ['--config.model.unroll=4', '--config.model.logprob_chunk=8']
  config = flatten(_parsed(_TINY, *changed, *set_to))
  for name, (auto, _) in automatic.FIELDS.items():
    assert config[name] == auto
  assert '--config.ppo.steps' in _message(_TINY, '--config.ppo.steps=auto')


def test_values_that_look_like_flags_are_left_alone() -> None:
  config = _parsed(_TINY, '--config.data.path=--config.ppo.from=x')
  assert config.data.path == '--config.ppo.from=x'


@pytest.mark.parametrize(
    'arguments, words',
    [
        ([f'{_TINY}:n=1'], "error: recipe argument 'n' is unknown; known are"),
        ([f'{_TINY}:ngram=x'], "'x' is not of type int"),
        (['--config=/nowhere/tiny.py'], '/nowhere/tiny.py: there is no such'),
        (['--config', 'nowhere.py:ngram=1'], 'nowhere.py: there is no such'),
        ([_TINY, '--config.ppo.kl_coef=much'], '--config.ppo.kl_coef=much'),
        (
            [_TINY, '--config.ppo.kl_coeff=1'],
            'the config has no field \'kl_coeff\'\nDid you mean "kl_coef"',
        ),
        ([_TINY, '--wordkir=x'], "unknown command line flag 'wordkir'"),
    ],
)
def test_a_wrong_flag_ends_in_one_message(
    arguments: list[str], words: str
) -> None:
  message = _message(*arguments)
  assert message.startswith('error: ') and words in message
