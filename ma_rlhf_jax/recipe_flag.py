"""The flag --config of the commands: a recipe, its arguments, its fields."""

import pathlib
import re
import sys

from absl import flags
from ml_collections import config_flags

from ma_rlhf_jax.config import base, default_recipe, flatten
from ma_rlhf_jax.training import automatic

ARGV: list[str] = []  # the command line as `parse` spells it

CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'The recipe, and its arguments after a colon. Default: configs/tiny.py.',
    sys_argv=ARGV,
)


def _missing_recipe(argv: list[str]) -> str:
  """What to say where --config or --other names no file; '' if they do."""
  for flag, following in zip(argv, [*argv[1:], ''], strict=True):
    if match := re.fullmatch(r'--?(?:config|other)(?:=(.*))?', flag):
      path = (match.group(1) or following).partition(':')[0]
      if not pathlib.Path(path).is_file():
        return (
            f'{flag.partition("=")[0]}={path}: there is no such file in '
            f'{pathlib.Path.cwd()}; give the path of a recipe, '
            f'{default_recipe()} for example'
        )
  return ''


def _words(error: BaseException) -> str:
  """The message; that of the cause where ml_collections wraps one."""
  while 'Traceback' in str(error) and error.__context__ is not None:
    error = error.__context__
  if isinstance(error.args[0], KeyError):
    return f'the config has no field {error.args[0].args[0]}'
  return str(error)


def _last_tuples(argv: list[str]) -> list[str]:
  """Without all but the last value of each tuple, which would be joined."""
  tuples = [k for k, v in flatten(base()).items() if isinstance(v, list)]
  kept, seen = list(argv), set()
  for i in range(len(argv) - 1, 0, -1):
    match = re.fullmatch(
        r'--?((?:config|other)\.([\w.]+))(=.*)?', argv[i], re.S
    )
    if not match or match[2] not in tuples:
      continue
    if match[1] in seen:
      del kept[i : i + (1 if match[3] else 2)]
    seen.add(match[1])
  return kept


def parse(argv: list[str]) -> list[str]:
  """Parses flags; `--config.ppo.from=` is spelt `from_run` inside.

  `from` is a Python keyword, which a config field cannot be named. `auto` of a
  field that holds a number is spelt as the number that stands for it. Without
  --config the default recipe is put first, so that fields can be set.
  """
  spelt = [
      re.sub(r'^(--?config\.ppo\.from)(?==|$)', r'\1_run', a) for a in argv
  ]
  for name, (auto, _) in automatic.FIELDS.items():
    pattern = rf'^(--?(?:config|other)\.{re.escape(name)}=)auto$'
    spelt = [re.sub(pattern, rf'\g<1>{auto}', a) for a in spelt]
  if not any(re.match(r'--?config(=|$)', a) for a in spelt):
    spelt.insert(1, f'--config={default_recipe()}')
  if missing := _missing_recipe(spelt):
    sys.exit(f'error: {missing}')
  spelt = _last_tuples(spelt)
  ARGV[:] = spelt
  try:
    return flags.FLAGS(spelt)
  except (flags.Error, AttributeError, ValueError, OSError) as error:
    sys.exit(f'error: {_words(error)}')
  except SyntaxError as error:
    sys.exit(f'error: a recipe must be Python: {error}')
