"""What `--config.help` prints, and the page of all fields, `configuration.md`.

python -m ma_rlhf_jax.commands.config_help > ma_rlhf_jax/configuration.md
"""

import sys
import textwrap

from ma_rlhf_jax.config_fields import BLOCKS
from ma_rlhf_jax.fields import Field

_SOURCES = (
    'Defaults are those of base(), and a recipe may set others. Source: paper '
    'is arXiv 2410.02743, authors is their code, ernie-research/MA-RLHF, SPO '
    'is arXiv 2505.23564.'
)
_TITLE = '<!-- Made by ma_rlhf_jax.commands.config_help. -->\n# Config fields'
_HEAD = (
    '| field | default | meaning | allowed | source | resume |\n'
    '|---|---|---|---|---|---|'
)


def filled(text: str, indent: int = 0) -> str:
  """`text` in lines of at most 80 characters, broken at blanks alone."""
  blank = ' ' * indent
  return textwrap.fill(
      text,
      initial_indent=blank,
      subsequent_indent=blank,
      width=80,
      break_long_words=False,
      break_on_hyphens=False,
  )


def _entry(name: str, field: Field) -> str:
  """A field as it stands in a help."""
  said = [field.meaning]
  if need := field.check.need:
    said.append(f'{need[0].upper()}{need[1:]}.')
  if field.source:
    said.append(f'Source: {field.source}.')
  if field.resumable:
    said.append('May change on resume.')
  return f'  --config.{name}={field.default!r}\n{filled(" ".join(said), 6)}'


def _whole(block: str, name: str) -> str:
  """The name of a field of a block, as flags spell it."""
  name = 'from' if name == 'from_run' else name
  return name if block == 'run' else f'{block}.{name}'


def text(asked: str = '') -> str:
  """The help of some fields, in lines of at most 80 characters.

  Args:
    asked: a block, as `ppo` or `ppo.optim`, or a field; '' = all.

  Raises:
    ValueError: if there is no such block; the message lists them.
  """
  found = []
  for name, block in BLOCKS.items():
    entries = [
        _entry(whole, field)
        for own, field in block.fields.items()
        for whole in [_whole(name, own)]
        if asked in ('', name) or f'{whole}.'.startswith(f'{asked}.')
    ]
    if entries:
      found.append('\n'.join([f'{name}: {block.title}', *entries]))
  if not found:
    raise ValueError(
        f'--config.help={asked}: there is no such block; the blocks are '
        f'{", ".join(BLOCKS)}'
    )
  return '\n\n'.join([filled(_SOURCES), *found])


def _row(name: str, field: Field) -> str:
  cells = (
      f'`{name}`',
      repr(field.default),
      field.meaning,
      field.check.need,
      field.source,
      'may change' if field.resumable else '',
  )
  return f'| {" | ".join(cells)} |'


def page() -> str:
  """All fields as a Markdown page, a table for each block."""
  parts = [_TITLE, filled(_SOURCES)]
  for name, block in BLOCKS.items():
    rows = [_row(_whole(name, own), f) for own, f in block.fields.items()]
    parts.append('\n'.join([f'## {name}: {block.title}\n', _HEAD, *rows]))
  return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
  sys.stdout.write(page())
