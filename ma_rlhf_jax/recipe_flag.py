"""The flag --config of the commands: a recipe, its arguments, its fields."""

import difflib
import pathlib
import re
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from ma_rlhf_jax import recipe
from ma_rlhf_jax.commands import verbs
from ma_rlhf_jax.config import ARGUMENTS, base, default_recipe, flatten
from ma_rlhf_jax.training import automatic

ARGV: list[str] = []  # the command line as `parse` spells it


class _Parser(flags.ArgumentParser):
  """Reads a recipe; what is wrong with it is a `recipe.RecipeError`."""

  def parse(self, argument: str) -> ConfigDict:
    return recipe.load(argument)

  def flag_type(self) -> str:
    return 'recipe'


def define(name: str, help_string: str) -> flags.FlagHolder:
  """A flag that names a recipe, whose fields are flags too."""
  holder = config_flags.DEFINE_config_file(
      name, None, help_string, sys_argv=ARGV
  )
  flags.FLAGS[name].parser = _Parser()
  return holder


CONFIG = define('config', verbs.RECIPE[0].help)


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
  return recipe.words(error)


def _unknown_flag(name: str) -> str:
  """What to say of a flag that there is not: its name, and close ones."""
  fields = {f'config.{field}': field.rpartition('.')[2] for field in _fields()}
  known = {name: name for name in flags.FLAGS} | fields
  own = name.rpartition('.')[2]
  close = difflib.get_close_matches(own, set(known.values()), cutoff=0.75)
  found = sorted(flag for flag, last in known.items() if last in close)[:5]
  said = f'unknown command line flag {name!r}'
  if found:
    return f'{said}; did you mean {", ".join(f"--{flag}" for flag in found)}?'
  return f'{said}; --help lists the flags, and fields are --config.FIELD'


def _check_arguments() -> None:
  """Raises where a field is set to two values, by an argument and a flag."""
  flag = flags.FLAGS['config']
  set_to = config_flags.get_override_values(flag)
  arguments = config_flags.get_config_filename(flag).partition(':')[2]
  for item in arguments.split(','):
    name, _, text = item.partition('=')
    if name not in ARGUMENTS:
      continue
    field, parse_value = ARGUMENTS[name]
    if field in set_to and set_to[field] != parse_value(text):
      raise recipe.RecipeError(
          f'{item} after the colon of --config and --config.{field}='
          f'{set_to[field]} contradict each other; leave one of them out'
      )


def _fields() -> list[str]:
  """Every field of a config, as flags spell it."""
  return [field.replace('from_run', 'from') for field in flatten(base())]


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
    rest = flags.FLAGS(spelt)
    _check_arguments()
    return rest
  except flags.UnrecognizedFlagError as error:
    sys.exit(f'error: {_unknown_flag(error.flagname)}')
  except (
      recipe.RecipeError,
      flags.Error,
      AttributeError,
      KeyError,
      ValueError,
      OSError,
  ) as error:
    sys.exit(f'error: {_words(error)}')
