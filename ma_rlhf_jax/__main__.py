"""Lists the commands: `python -m ma_rlhf_jax`."""

import sys

from ma_rlhf_jax.commands import tools, verbs
from ma_rlhf_jax.commands.command import HELP, PACKAGE, Command, version

COMMANDS = (
    verbs.TRAIN,
    verbs.GENERATE,
    verbs.EVALUATE,
    verbs.EXPORT,
    tools.PLAN,
    tools.BENCH,
    tools.EXPLORE,
    tools.LAYOUT,
    # It runs without this package as well, and reads its flags itself.
    Command('tools.parse', (), ()),
)


def listing() -> str:
  """Every command with the first line of its help."""
  lines = [f'  {c.name:<14} {c.doc().splitlines()[0]}' for c in COMMANDS]
  return '\n'.join(
      [
          f'usage: python -m {PACKAGE}.COMMAND [flags]\n\ncommands:',
          *lines,
          f'\nFlags, units, defaults and examples of one of them:\n'
          f'  python -m {PACKAGE}.train --help\nversion:\n'
          f'  python -m {PACKAGE} --version',
      ]
  )


def main(words: list[str]) -> None:
  """Prints the list, or the version."""
  if not words or words[0] in HELP:
    print(listing())
  elif words == ['--version']:
    print(version())
  else:
    names = [command.name for command in COMMANDS]
    name = next((n for n in names if words[0] in n.split('.')), 'train')
    sys.exit(
        f'error: {words[0]!r} is no flag of {PACKAGE}; a command has a dot '
        f'before its name: python -m {PACKAGE}.{name}'
    )


if __name__ == '__main__':
  main(sys.argv[1:])
