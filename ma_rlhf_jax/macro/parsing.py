"""Macro actions from constituency trees.

  (S (NP (DT The) (JJ old) (NN cat)) (VP (VBD sat) (PP (IN on) (NN it))) (. .))

With a cutoff of 4 tokens `The old cat` and `sat on it` are small enough, and
the single leaf `.` joins what stands before it; with one of 3 only `on it` is:

  The old cat | sat on it .        The old cat sat | on it .

Source: MA-RLHF, arXiv 2410.02743, appendix B.4. The authors' code tokenises
leaf by leaf and adds up (tests/authors/parsing.py); here tokens meet leaves by
their characters, so a line break or `don't` shifts nothing, and nothing stops a
run.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import re
from typing import Any, NamedTuple

import numpy as np

from ma_rlhf_jax.macro import spelling as spelling_lib
from ma_rlhf_jax.macro.spelling import Spelling

_OPEN, _CLOSE = object(), object()
_BRACKETS = re.compile(r'[()]|[^\s()]+')
# Beyond that an object is no tree; one that holds itself has no end.
_MAX_EVENTS = 200_000
# One character for another, on both sides.
_ALIKE = str.maketrans('‘’‚‹›`“”„«»–—‑', "''''''\"\"\"\"\"---")
# How treebanks write what the text has otherwise, after `_ALIKE`.
_ESCAPES = {
    '-LRB-': '(',
    '-RRB-': ')',
    '-LSB-': '[',
    '-RSB-': ']',
    '-LCB-': '{',
    '-RCB-': '}',
    '\\/': '/',
    '\\*': '*',
}
_VARIANTS = {"''": '"', '"': "''", '--': '-', '...': '…', '…': '...'}


class Tree(NamedTuple):
  """A tree as flat lists.

  Attributes:
    leaves: the words, without white space.
    nodes: (first leaf, leaf behind the last, node behind the subtree) of each
      node and each leaf, parents before children.
  """

  leaves: list[str]
  nodes: list[tuple[int, int, int]]


class Stretch(NamedTuple):
  """A part of the text: a sentence with its tree, or what no tree covers.

  Attributes:
    begin: offset of its first character.
    end: offset behind its last; `begin` where a failed tree left no text.
    sentences: how many it counts for.
    tree: None = fall back.
    begins: offset of each leaf.
    ends: offset behind each leaf.
  """

  begin: int
  end: int
  sentences: int
  tree: Tree | None = None
  begins: Sequence[int] = ()
  ends: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Parsed:
  """The macro actions of one response.

  Attributes:
    starts: bool [T], true where a macro action opens.
    sentences: parsed and failed ones.
    fallbacks: the failed ones.
  """

  starts: np.ndarray
  sentences: int
  fallbacks: int


def _bracket_events(text: str) -> Iterator[Any]:
  """What a bracketed string opens, holds and closes; labels are left out."""
  is_label = False
  for part in _BRACKETS.findall(text):
    if part == '(':
      yield _OPEN
    elif part == ')':
      yield _CLOSE
    elif not is_label:
      yield part
    is_label = part == '('


def _object_events(tree: Any) -> Iterator[Any]:
  """The same of an object with `label` that holds others and words."""
  if not hasattr(tree, 'label'):
    raise TypeError(f'{type(tree).__name__} is no tree')
  stack = [iter([tree])]
  while stack:
    child = next(stack[-1], _CLOSE)
    if child is _CLOSE:
      stack.pop()
      if stack:
        yield _CLOSE
    elif isinstance(child, str):
      yield child
    elif hasattr(child, 'label'):
      yield _OPEN
      stack.append(iter(child))
    else:
      raise TypeError(f'{type(child).__name__} is neither tree nor word')


def _build(events: Iterable[Any]) -> Tree:
  """One tree; ValueError if the events are no tree or more than one."""
  leaves, nodes, parents = [], [], []
  for count, event in enumerate(events):
    if count > _MAX_EVENTS or not (parents or (event is _OPEN and not nodes)):
      raise ValueError('not one tree')
    if event is _OPEN:
      parents.append(len(nodes))
      nodes.append((len(leaves), 0, 0))
    elif event is _CLOSE:
      index = parents.pop()
      nodes[index] = (nodes[index][0], len(leaves), len(nodes))
    elif word := ''.join(event.split()):
      nodes.append((len(leaves), len(leaves) + 1, len(nodes) + 1))
      leaves.append(word)
  if parents or not nodes:
    raise ValueError('the tree ends too early')
  return Tree(leaves, nodes)


def read(tree: Any) -> Tree | None:
  """The tree in flat form; None where it is malformed.

  Args:
    tree: a string such as `(S (NP (DT The) (NN cat)))`, or an object like
      nltk.Tree, with `label` and an iterator over objects like it and words.
      POS tags may be missing. A `Tree` or None is handed back.
  """
  if tree is None or isinstance(tree, Tree):
    return tree
  is_text = isinstance(tree, str)
  try:
    return _build(_bracket_events(tree) if is_text else _object_events(tree))
  # The objects are the user's own: whatever they raise, the run goes on, and
  # the sentence is counted as one without a tree.
  except Exception:
    return None


def _variants(leaf: str) -> list[str]:
  """What a leaf may look like in the text, in the order of preference."""
  leaf = leaf.translate(_ALIKE)
  plain = leaf
  for escape, meaning in _ESCAPES.items():
    plain = plain.replace(escape, meaning)
  found = [leaf, plain, _VARIANTS.get(plain, plain)]
  return list(dict.fromkeys(found))


Edges = list[int]  # where a tree's leaves begin, and the last one ends
Variants = Sequence[Sequence[str]]  # of each leaf


def _edges(variants: Variants, solid: str, at: int) -> Edges | None:
  """The leaves one after the other from `at`; None if they are not there."""
  edges = [at]
  for words in variants:
    word = next((word for word in words if solid.startswith(word, at)), None)
    if word is None:
      return None
    at += len(word)
    edges.append(at)
  return edges


def _in_a_row(
    trees: Sequence[Variants | None], solid: str
) -> list[Edges] | None:
  """Each tree right behind the one before; None if one of them is not."""
  placed, cursor = [], 0
  for variants in trees:
    edges = _edges(variants, solid, cursor) if variants else None
    if edges is None:
      return None
    placed.append(edges)
    cursor = edges[-1]
  return placed


def _occurrences(variants: Variants, solid: str) -> list[Edges]:
  """Every place at which all leaves of a tree stand in a row."""
  found = {}
  for word in variants[0]:
    at = solid.find(word)
    while at >= 0:
      if edges := _edges(variants, solid, at):
        found[at] = edges
      at = solid.find(word, at + 1)
  return [found[at] for at in sorted(found)]


# Of the ways to place trees that repeat, so many that cover most are kept.
_MAX_WAYS = 200


def _best_places(
    trees: Sequence[Variants | None], solid: str
) -> list[Edges | None]:
  """Places in order and apart, so that they cover as much as they can."""
  # A way leads to a cursor: cursor -> (characters covered, (way before, edges))
  ways = {0: (0, None)}
  for variants in trees:
    found = _occurrences(variants, solid) if variants else []
    taken = {cursor: (n, (way, None)) for cursor, (n, way) in ways.items()}
    for cursor, (n, way) in ways.items():
      index = bisect.bisect_left(found, [cursor])
      if index == len(found):
        continue
      begin, end = found[index][0], found[index][-1]
      if n + end - begin > taken.get(end, (-1,))[0]:
        taken[end] = n + end - begin, (way, found[index])
    # A way that covers less and is further on leads nowhere better.
    ways, most = {}, -1
    for cursor in sorted(taken):
      if taken[cursor][0] > most:
        ways[cursor] = taken[cursor]
        most = taken[cursor][0]
    for cursor in list(ways)[:-_MAX_WAYS]:
      del ways[cursor]
  placed, (_, way) = [], ways[max(ways)]
  while way:
    way, edges = way
    placed.append(edges)
  return placed[::-1]


def _left_out(
    offsets: Sequence[int], begin: int, end: int, failed: int
) -> list[Stretch]:
  """The stretch without a tree from `begin` to `end`, if there is any."""
  count = max(failed, int(end > begin))
  if not count:
    return []
  # Failed trees may leave no text.
  last = offsets[end - 1] + 1 if end else 0
  first = offsets[begin] if end > begin else last
  return [Stretch(first, last, count)]


def align(trees: Sequence[Any], text: str) -> list[Stretch]:
  """The text in stretches: each tree where it stands, and what is left.

  Leaves are compared without white space, and with quotes, dashes and brackets
  as treebanks write them.

  Args:
    trees: in the order of the text; see `read`. None = the parser failed.
    text: what was parsed.

  Returns:
    Stretches in the order of the text that together hold all but white space.
    A tree that is malformed, or does not stand behind the one before, counts
    as a failed sentence; so does text that no tree covers.
  """
  offsets = [i for i, char in enumerate(text) if not char.isspace()]
  solid = ''.join(text[i] for i in offsets).translate(_ALIKE)
  # Trees of white space stand nowhere and are no failure.
  known = [tree for tree in map(read, trees) if tree is None or tree.leaves]
  leaves = [[_variants(x) for x in t.leaves] if t else None for t in known]
  placed = _in_a_row(leaves, solid) or _best_places(leaves, solid)
  stretches, cursor, failed = [], 0, 0
  for tree, edges in zip(known, placed, strict=True):
    if edges is None:
      failed += 1
      continue
    stretches += _left_out(offsets, cursor, edges[0], failed)
    begins = [offsets[i] for i in edges[:-1]]
    ends = [offsets[i - 1] + 1 for i in edges[1:]]
    stretches.append(Stretch(begins[0], ends[-1], 1, tree, begins, ends))
    cursor, failed = edges[-1], 0
  return stretches + _left_out(offsets, cursor, len(offsets), failed)


def _constituents(
    stretch: Stretch, first: np.ndarray, cutoff: int
) -> Iterator[int]:
  """Offsets at which a constituent of fewer than `cutoff` tokens begins."""
  nodes, index = stretch.tree.nodes, 0
  while index < len(nodes):
    leaf, behind, skip = nodes[index]
    if behind - leaf < 2:  # joins what stands before it
      index = skip
      continue
    span = stretch.begins[leaf], stretch.ends[behind - 1]
    begin, end = np.searchsorted(first, span)
    if end - begin < cutoff:
      yield span[0]
    index = skip if end - begin < cutoff else index + 1


def segment(
    spelling: Spelling,
    trees: Sequence[Any],
    *,
    cutoff: int,
    fallback: str,
    ngram: int,
) -> Parsed:
  """The macro actions of a response that has been parsed.

  Walking down a tree, a node of two leaves or more and fewer than `cutoff`
  tokens is one macro action; a leaf that is left alone joins the macro action
  before it, or opens the sentence. Each sentence opens one.

  Args:
    spelling: the response.
    trees: of its sentences; see `align`.
    cutoff: tokens, >= 1; a node's tokens are those whose first non-blank
      character lies in it.
    fallback: of a sentence without a tree: `fixed` or `one` macro action.
    ngram: tokens per macro action of `fixed`; 0 = one.
  """
  stretches = align(trees, spelling.text)
  first = spelling_lib.first_characters(spelling)
  tokens = np.flatnonzero(first >= 0)
  solid = first[tokens]
  boundaries = [stretch.begin for stretch in stretches]
  for stretch in stretches:
    if stretch.tree:
      boundaries += _constituents(stretch, solid, cutoff)
  starts = spelling_lib.starts(spelling, boundaries)

  # The tokens of a stretch end where those of the next one begin.
  firsts = np.append(tokens, len(first))
  opens = firsts[np.searchsorted(solid, [s.begin for s in stretches])]
  opens = [*opens.tolist(), len(first)]
  for index, stretch in enumerate(stretches):
    if stretch.tree is None and fallback == 'fixed' and ngram:
      begin = opens[index] if index else 0
      starts[begin : opens[index + 1] : ngram] = True
  failed = sum(s.sentences for s in stretches if s.tree is None)
  return Parsed(starts, sum(s.sentences for s in stretches), failed)
