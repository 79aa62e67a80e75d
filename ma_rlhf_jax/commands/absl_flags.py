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
  """Defines each flag that is not defined elsewhere.

  Args:
    table: flags of a command.
    values: where they are defined; None = those of the process.
  """
  values = flags.FLAGS if values is None else values
  for flag in table:
    how = {'flag_values': values}
    texts = (flag.name, flag.default, flag.help)
    if flag.kind in _DEFINE_NUMBER:
      _DEFINE_NUMBER[flag.kind](*texts, lower_bound=flag.least, **how)
    elif flag.kind in _DEFINE:
      _DEFINE[flag.kind](*texts, **how)
    elif flag.kind is not None:
      name, default, text = texts
      flags.DEFINE_enum(name, default, list(flag.kind), text, **how)


def parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags; what is wrong with them is one line."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    sys.exit(f'error: {error}')
