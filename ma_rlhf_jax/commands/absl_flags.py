"""Defines and parses the absl flags that the table of a command lists."""

from collections.abc import Sequence
import sys

from absl import flags

from ma_rlhf_jax.commands.command import Flag

_DEFINE = {
    str: flags.DEFINE_string,
    bool: flags.DEFINE_bool,
    list: flags.DEFINE_list,
    tuple: flags.DEFINE_multi_string,
}
_DEFINE_NUMBER = {int: flags.DEFINE_integer, float: flags.DEFINE_float}


def define(
    table: Sequence[Flag], values: flags.FlagValues | None = None
) -> None:
  """Defines each flag of a table.

  Args:
    table: flags of a command.
    values: where they are defined; None = those of the process.
  """
  values = flags.FLAGS if values is None else values
  for flag in table:
    how = {'name': flag.name, 'default': flag.default, 'help': flag.help}
    how |= {'flag_values': values}
    kind = flag.kind or (str if flag.default is None else type(flag.default))
    if kind in _DEFINE_NUMBER:
      _DEFINE_NUMBER[kind](lower_bound=flag.least, **how)
    elif kind in _DEFINE:
      _DEFINE[kind](**how)
    else:
      flags.DEFINE_enum(enum_values=list(kind), **how)


def parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags; what is wrong with them is one line."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    sys.exit(f'error: {error}')
