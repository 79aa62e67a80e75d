"""What `explore` has found, as text for a terminal and as an HTML page."""

import dataclasses
import html

import numpy as np

from ma_rlhf_jax.training import console

# Background colours of macro actions in turn: terminal codes, and hues.
_CODES = (44, 42, 45, 46, 43, 41)
_HUES = (210, 120, 300, 180, 50, 0)
_BAR = 40  # characters of the longest bar


@dataclasses.dataclass(frozen=True)
class Ruled:
  """The responses under one rule.

  Attributes:
    name: of the rule.
    ids: int [B, T], macro action of each token.
    advantages: float [B, T], reward-model units.
    lengths: int, tokens of every macro action.
    statistics: see `aggregate.statistics`.
    note: what else to say of it; ''.
  """

  name: str
  ids: np.ndarray
  advantages: np.ndarray
  lengths: np.ndarray
  statistics: dict[str, float]
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Told:
  """All there is to show.

  Attributes:
    pieces: the tokens of each response as text.
    ruled: rule A and rule B.
    scores: terminal reward of each response, in words.
    trained: whether the tokenizer was trained on these texts.
  """

  pieces: list[list[str]]
  ruled: list[Ruled]
  scores: list[str]
  trained: bool


def _visible(piece: str) -> str:
  """A token on one line, without what a terminal would obey."""
  return console.one_line(piece.replace('\t', '⇥')) or '�'


def _coloured(pieces: list[str], ids: np.ndarray, color: bool) -> str:
  """The response, one background or one pair of brackets a macro action."""
  groups: dict[int, str] = {}
  for piece, index in zip(pieces, ids, strict=False):
    groups[int(index)] = groups.get(int(index), '') + _visible(piece)
  if not color:
    return ''.join(f'[{words}]' for words in groups.values())
  return ''.join(
      f'\x1b[30;{_CODES[i % len(_CODES)]}m{words}\x1b[0m'
      for i, words in groups.items()
  )


def histogram(lengths: np.ndarray) -> list[tuple[str, int]]:
  """(tokens, macro actions): single lengths up to 10, then by doubling."""
  edges = [*range(1, 11)]
  while edges[-1] < lengths.max(initial=1):
    edges.append(edges[-1] * 2)
  found, below = [], 0
  for edge in edges:
    count = int(((lengths > below) & (lengths <= edge)).sum())
    name = str(edge) if edge == below + 1 else f'{below + 1}-{edge}'
    found.append((name, count))
    below = edge
  while found and not found[-1][1]:
    found.pop()
  return found


def _summary(ruled: Ruled) -> str:
  s = ruled.statistics
  return (
      f'{len(ruled.lengths)} decisions, {s["per_response"]:.1f} per response, '
      f'{s["length_mean"]:.2f} tokens each (95 % at most {s["length_p95"]:g})'
  )


def _bars(lengths: np.ndarray) -> list[str]:
  rows = histogram(lengths)
  most = max((count for _, count in rows), default=1)
  bar = lambda count: '█' * max(count > 0, count * _BAR // most)
  return [f'  {name:>9} tokens  {bar(count)} {count}' for name, count in rows]


def _advantages(told: Told, row: int) -> list[str]:
  """A line a token: the advantage under either rule."""
  lines = [f'    {"token":16}{"A":>10}{"B":>10}']
  for t, piece in enumerate(told.pieces[row]):
    a, b = (f'{r.advantages[row, t]:+10.4f}' for r in told.ruled)
    lines.append(f'    {_visible(piece)!r:16}{a}{b}')
  return lines


def text(told: Told, rows: int, color: bool) -> str:
  """For the terminal; the advantages of the first response are a table."""
  lines = []
  if told.trained:
    lines.append(
        'tokenizer: trained on these texts (--tokenizer names another)'
    )
  for name, ruled in zip('AB', told.ruled, strict=True):
    lines += [f'{name}: {ruled.name}', f'   {_summary(ruled)}']
    lines += [f'   {ruled.note}'] if ruled.note else []
  for row, pieces in enumerate(told.pieces[:rows]):
    lines += ['', f'response {row + 1}, score {told.scores[row]}']
    for name, ruled in zip('AB', told.ruled, strict=True):
      lines.append(f'  {name} {_coloured(pieces, ruled.ids[row], color)}')
  lines += ['', 'advantages of response 1']
  lines += _advantages(told, 0)
  for name, ruled in zip('AB', told.ruled, strict=True):
    lines += ['', f'lengths under {name}', *_bars(ruled.lengths)]
  return '\n'.join(lines)


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; }
body { margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2rem; }
td, th { padding: 0 .6rem; text-align: right; }
.t { display: inline-block; text-align: center; white-space: pre; }
.t { padding: 0 1px; margin-bottom: 4px; color: #000; }
.t small { display: block; font-size: 9px; }
.t small { color: CanvasText; background: Canvas; }
.b { display: inline-block; height: 12px; vertical-align: middle; }
.b { background: hsl(210 60% 55%); }
"""


def _token(piece: str, index: int, advantage: float) -> str:
  hue = _HUES[index % len(_HUES)]
  told = f'macro action {index}, advantage {advantage:+.5f}'
  return (
      f'<span class=t style="background:hsl({hue} 70% 82%)" title="{told}">'
      f'{html.escape(_visible(piece))}<small>{advantage:+.2f}</small></span>'
  )


def _response(told: Told, row: int) -> str:
  parts = [f'<h2>Response {row + 1}, score {told.scores[row]}</h2>']
  for name, ruled in zip('AB', told.ruled, strict=True):
    tokens = ''.join(
        _token(piece, int(ruled.ids[row, t]), float(ruled.advantages[row, t]))
        for t, piece in enumerate(told.pieces[row])
    )
    parts.append(f'<p><b>{name}</b> {tokens}</p>')
  return ''.join(parts)


def _table(ruled: Ruled) -> str:
  rows = histogram(ruled.lengths)
  most = max((count for _, count in rows), default=1)
  return ''.join(
      f'<tr><td>{name}<td>{count}<td style="text-align:left">'
      f'<span class=b style="width:{240 * count // most}px"></span></tr>'
      for name, count in rows
  )


def page(told: Told, rows: int) -> str:
  """A self-contained HTML page; numbers under tokens are advantages."""
  heads = ''.join(
      f'<p><b>{name}</b> {html.escape(ruled.name)}<br>{_summary(ruled)}'
      f'{"<br>" + html.escape(ruled.note) if ruled.note else ""}</p>'
      f'<table><tr><th>tokens<th>macro actions<th></tr>{_table(ruled)}</table>'
      for name, ruled in zip('AB', told.ruled, strict=True)
  )
  shown = range(min(rows, len(told.pieces)))
  body = ''.join(_response(told, row) for row in shown)
  return (
      '<!doctype html><html lang=en><meta charset=utf-8>'
      f'<title>Macro actions</title><style>{_STYLE}</style>'
      f'<h1>Macro actions</h1>{heads}{body}</html>\n'
  )
