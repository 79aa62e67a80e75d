"""Macro actions from trees, and that no tree or text stops them."""

from collections.abc import Iterator, Sequence
import gzip
import json
import os
import pathlib
import random
import re
from typing import Any

import numpy as np
import pytest

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.macro import parsing
from ma_rlhf_jax.macro import spelling as spelling_lib
from ma_rlhf_jax.macro.spelling import Spelling
from tests.macro.spelling_test import spelt

_DATA = os.environ.get(
    'MA_RLHF_DATA', str(pathlib.Path(__file__).parents[3] / 'shared' / 'data')
)
CAT = (
    '(S (NP (DT The) (JJ old) (NN cat))'
    ' (VP (VBD sat) (PP (IN on) (NN it))) (. .))'
)


class Node:
  """The least that an object like nltk.Tree has."""

  def __init__(self, label: str, children: Sequence[Any]):
    self._label, self._children = label, children

  def label(self) -> str:
    return self._label

  def __iter__(self) -> Iterator[Any]:
    return iter(self._children)


def _words(text: str) -> Spelling:
  """Each word with its blank is a token, a full stop one of its own."""
  return spelt(*text.replace(' ', '| ').replace('.', '|.').split('|'))


def _cut(
    spelling: Spelling, trees: Sequence[Any], **settings: Any
) -> list[str]:
  """The text of each macro action."""
  settings = {'cutoff': 4, 'fallback': 'one', 'ngram': 0} | settings
  parsed = parsing.segment(spelling, trees, **settings)
  at = [*spelling.begins[parsed.starts].tolist(), len(spelling.text)]
  return [spelling.text[a:b] for a, b in zip(at, at[1:], strict=False)]


def _counts(spelling: Spelling, trees: Sequence[Any]) -> tuple[int, int]:
  parsed = parsing.segment(spelling, trees, cutoff=5, fallback='fixed', ngram=2)
  return parsed.sentences, parsed.fallbacks


@pytest.mark.parametrize(
    'cutoff,macros',
    [
        (1, ['The old cat sat on it.']),  # nothing is small enough
        (2, ['The old cat sat on it.']),
        (3, ['The old cat sat', ' on it.']),  # 3 tokens are not below 3
        (4, ['The old cat', ' sat on it.']),
        (5, ['The old cat', ' sat on it.']),  # the sentence has 7
        (7, ['The old cat', ' sat on it.']),
        (8, ['The old cat sat on it.']),
    ],
)
def test_constituents_below_the_cutoff_are_macro_actions(
    cutoff: int, macros: list[str]
) -> None:
  assert _cut(_words('The old cat sat on it.'), [CAT], cutoff=cutoff) == macros


def test_a_leaf_that_comes_first_opens_the_sentence_alone() -> None:
  tree = '(S (CC And) (NP (DT the) (NN cat)) (VP (VBD sat)) (. .))'
  words = _words('And the cat sat.')
  assert _cut(words, [tree], cutoff=3) == ['And', ' the cat sat.']


def test_a_long_leaf_joins_like_any_other() -> None:
  # (NP the Antananarivo) has 4 tokens, so it is opened: two leaves.
  tree = '(S (NP (DT the) (NNP Antananarivo)) (VP (VBZ is) (JJ big)))'
  spelling = spelt('the', ' Ant', 'anan', 'arivo', ' is', ' big')
  assert _cut(spelling, [tree]) == ['the Antananarivo', ' is big']


def test_tokens_are_counted_by_characters() -> None:
  # `do` and `n't` are one token here: the node has 2 tokens, not 3 words.
  tree = "(S (NP (PRP I)) (VP (VBP do) (RB n't) (VB go)) (. .))"
  spelling = spelt('I', " don't", ' ', 'go', '.')
  assert _cut(spelling, [tree], cutoff=3) == ['I', " don't go."]
  assert _cut(spelling, [tree], cutoff=2) == ["I don't go."]


def test_a_boundary_within_a_token_is_dropped() -> None:
  tree = "(S (VP (VBP do)) (VP (RB n't) (VB go)) (VP (VB or) (VB stay)))"
  spelling = spelt("don't", ' go', ' or', ' stay')
  assert _cut(spelling, [tree], cutoff=3) == ["don't go", ' or stay']


def test_line_breaks_shift_nothing() -> None:
  trees = [
      '(S (NP (DT A) (NN cat)) (VP (VBD sat) (RB down)))',
      '(S (VB Go) (RB on))',
  ]
  spelling = spelt(
      '\n', 'A', ' cat', '\n\n', 'sat', ' down', ' \n', 'Go', ' on'
  )
  assert _cut(spelling, trees, cutoff=3) == [
      '\nA cat\n\n',
      'sat down \n',
      'Go on',
  ]


def test_trees_need_no_tags() -> None:
  bare = '(S (NP The old cat) (VP sat (PP on it)) .)'
  words = _words('The old cat sat on it.')
  assert _cut(words, [bare]) == _cut(words, [CAT])


def test_objects_and_strings_are_the_same_tree() -> None:
  tree = Node(
      'S', [Node('NP', ['The', 'cat']), Node('VP', [Node('VB', ['is'])])]
  )
  assert parsing.read(tree) == parsing.read('(S (NP The cat) (VP (VB is)))')


def test_a_tree_lists_parents_before_children() -> None:
  assert parsing.read('(S (NP the cat) sat)') == parsing.Tree(
      ['the', 'cat', 'sat'],
      # S, NP, the, cat, sat
      [(0, 3, 5), (0, 2, 4), (0, 1, 3), (1, 2, 4), (2, 3, 5)],
  )


def _endless() -> Node:
  node = Node('S', [])
  node._children = [node]
  return node


class Raising(Node):
  """Fails while it is read."""

  def __iter__(self) -> Iterator[Any]:
    raise ArithmeticError('no children today')


@pytest.mark.parametrize(
    'tree',
    [
        '', 'word', '(', '(S', '(S a', ')', '(S a))', '(S a) (S b)', 'a (S b)',
        7, 2.5, b'(S a)', ['S', 'a'], {'S': 'a'}, Node('S', [3]),
        Node('S', None), Raising('S', []), _endless(), object(),
    ],
)  # fmt: skip
def test_malformed_trees_are_counted(tree: Any) -> None:
  assert parsing.read(tree) is None
  assert _counts(_words('a b c'), [tree]) == (1, 1)


@pytest.mark.parametrize('kind', [str, Node])
def test_deep_trees_are_read(kind: type) -> None:
  if kind is str:
    tree = '(X ' * 50_000 + 'a b' + ')' * 50_000
  else:
    tree = Node('X', ['a', 'b'])
    for _ in range(50_000):
      tree = Node('X', [tree])
  assert parsing.read(tree).leaves == ['a', 'b']
  assert _counts(_words('a b'), [tree]) == (1, 0)


@pytest.mark.parametrize(
    'text,leaves',
    [
        ('(a) [b] {c}', '-LRB- a -RRB- -LSB- b -RSB- -LCB- c -RCB-'),
        ('say -LRB- now', 'say -LRB- now'),
        ('"so" he', "`` so '' he"),
        ("``so'' he", '" so " he'),
        ('“so” he', "`` so '' he"),
        ("'so' he", "` so ' he"),
        ('don’t go', "do n't go"),
        ('and/or 2*3', 'and\\/or 2\\*3'),
        ('go — now -- or', 'go -- now -- or'),
        ('wait… so', 'wait ... so'),
        ('smile :-) now', 'smile :--RRB- now'),
        ('hi 👍🏽 é', 'hi 👍🏽 é'),
        ('two  blanks\n\nhere', 'two blanks here'),
        ('1 000 men', '1000 men'),
    ],
)
def test_leaves_match_what_they_stand_for(text: str, leaves: str) -> None:
  (stretch,) = parsing.align([f'(S {leaves})'], text)
  assert stretch.tree is not None
  assert (stretch.begin, stretch.end) == (0, len(text))
  assert len(stretch.begins) == len(leaves.split())


def _parts(trees: Sequence[Any], text: str) -> list[tuple[str, bool, int]]:
  return [
      (text[s.begin : s.end], s.tree is not None, s.sentences)
      for s in parsing.align(trees, text)
  ]


def test_failed_sentences_leave_the_others_in_place() -> None:
  text = 'A b. C d. E f. G h.'
  trees = ['(S A b .)', None, '(S E q .)', '(S G h .)']
  assert _parts(trees, text) == [
      ('A b.', True, 1),
      ('C d. E f.', False, 2),
      ('G h.', True, 1),
  ]


def test_text_that_no_tree_covers_is_one_failure() -> None:
  assert _parts(['(S b c)'], 'a b c d e') == [
      ('a', False, 1),
      ('b c', True, 1),
      ('d e', False, 1),
  ]
  assert _parts([], ' a b ') == [('a b', False, 1)]
  assert _parts([], ' \n') == []


def test_a_failed_tree_without_text_counts_too() -> None:
  assert _parts(['(S a)', None, '(S b)', None], 'a b') == [
      ('a', True, 1),
      ('', False, 1),
      ('b', True, 1),
      ('', False, 1),
  ]


def test_a_tree_of_blanks_is_no_sentence() -> None:
  assert _parts(['(S (_SP \n))', '(S a)', Node('S', [' '])], 'a') == [
      ('a', True, 1)
  ]


def test_one_stray_match_does_not_cost_the_sentences_before_it() -> None:
  text = 'Well. I go now. You go now. No.'
  trees = ['(S No .)', '(S I go now .)', '(S You go now .)']
  assert _parts(trees, text) == [
      ('Well.', False, 1),
      ('I go now.', True, 1),
      ('You go now.', True, 1),
      ('No.', False, 1),
  ]


def test_equal_sentences_are_told_apart_by_their_order() -> None:
  assert _parts(['(S Yes .)'] * 3, 'Yes. Yes. Yes.') == [('Yes.', True, 1)] * 3


def test_repetition_does_not_try_every_place() -> None:
  text = 'no ' * 1_000 + 'yes'
  # One sentence failed, so that each could stand in many places: trying them
  # all would not end.
  parts = _parts([None, *['(S no no)'] * 499, '(S yes)'], text)
  assert sum(has_tree for _, has_tree, _ in parts) == 500


@pytest.mark.parametrize(
    'fallback,ngram,macros',
    [
        ('one', 2, ['A b.', ' C d e f.', ' G h.']),
        ('fixed', 0, ['A b.', ' C d e f.', ' G h.']),
        ('fixed', 2, ['A b.', ' C d', ' e f', '.', ' G h.']),
        ('fixed', 3, ['A b.', ' C d e', ' f.', ' G h.']),
    ],
)
def test_a_failed_sentence_follows_the_fallback(
    fallback: str, ngram: int, macros: list[str]
) -> None:
  words = _words('A b. C d e f. G h.')
  trees = ['(S A b .)', None, '(S G h .)']
  assert _cut(words, trees, fallback=fallback, ngram=ngram) == macros


def test_without_any_tree_the_fallback_is_the_rule_itself() -> None:
  spelling = spelt(' ', '\n', 'a', 'b', ' ', 'c', '')  # the last one is EOS
  parsed = parsing.segment(
      spelling, [None], cutoff=5, fallback='fixed', ngram=3
  )
  assert parsed.starts.astype(int).tolist() == [1, 0, 0, 1, 0, 0, 1]
  assert (parsed.sentences, parsed.fallbacks) == (1, 1)


def test_an_empty_response_has_no_sentence() -> None:
  for spelling, starts in ((spelt(), []), (spelt(''), [True])):
    parsed = parsing.segment(spelling, [], cutoff=5, fallback='fixed', ngram=1)
    assert parsed.starts.tolist() == starts
    assert (parsed.sentences, parsed.fallbacks) == (0, 0)


# What follows draws responses and trees.

_WORDS = ['the', 'cat', 'sat', 'Paris', 'antidisestablishment', 'é', 'naïve',
          '👍🏽', '日本', '3.5', '-', '—', '"', '…', ',', '.', '!', ':-)',
          '(', ')', '[', ']', '{', '}', 'x' * 30]  # fmt: skip
_BLANKS = ['', ' ', ' ', ' ', '  ', '\n', '\n\n', ' \n\t']
_CONTRACTIONS = [('do', "n't"), ('it', "'s"), ('they', "'re"), ('can', 'not')]
_BRACKETS = {'(': '-LRB-', ')': '-RRB-', '[': '-LSB-', ']': '-RSB-'}


def _draw_tree(draw: random.Random, leaves: list[str]) -> Node:
  """A random tree over the leaves, with and without tags."""
  if len(leaves) == 1:
    return Node('T', leaves) if draw.random() < 0.8 else leaves[0]
  cuts = draw.sample(
      range(1, len(leaves)), draw.randint(1, min(3, len(leaves) - 1))
  )
  edges = [0, *sorted(cuts), len(leaves)]
  parts = zip(edges, edges[1:], strict=False)
  return Node('N', [_draw_tree(draw, leaves[a:b]) for a, b in parts])


def _bracketed(tree: Node | str) -> str:
  if isinstance(tree, str):
    for bracket, name in _BRACKETS.items():
      tree = tree.replace(bracket, name)
    return tree
  return f'({tree.label()} {" ".join(map(_bracketed, tree))})'


def _draw_trees(draw: random.Random, words: Sequence[str]) -> list[Node | str]:
  """Trees of random sentences, some as objects and some as strings."""
  trees, at = [], 0
  while at < len(words):
    size = draw.randint(1, 12)
    # A tree of one leaf is no bare word.
    tree = Node('S', [_draw_tree(draw, words[at : at + size])])
    trees.append(tree if draw.random() < 0.3 else _bracketed(tree))
    at += size
  return trees


def _draw_text(draw: random.Random) -> tuple[str, list[int], list[str]]:
  """A text, where its leaves begin, and what they are in the trees."""
  text, begins, leaves = draw.choice(_BLANKS), [], []
  for _ in range(draw.randint(0, 40)):
    words = [draw.choice(_WORDS)]
    if draw.random() < 0.2:
      words = draw.choice(_CONTRACTIONS)
    for word in words:
      begins.append(len(text))
      leaves.append(word)
      text += word
    text += draw.choice(_BLANKS)
  return text, begins, leaves


def _draw_spelling(draw: random.Random, text: str) -> Spelling:
  """The text in random tokens, some of them without characters."""
  cuts = draw.choices(range(len(text) + 1), k=draw.randint(0, len(text)))
  edges = [0, *sorted(cuts), len(text)]
  return spelt(*(text[a:b] for a, b in zip(edges, edges[1:], strict=False)))


def _check(
    spelling: Spelling, trees: Sequence[Any], begins: Sequence[int], cutoff: int
) -> np.ndarray:
  """Asserts what holds for every response that has been parsed."""
  parsed = parsing.segment(
      spelling, trees, cutoff=cutoff, fallback='fixed', ngram=3
  )
  assert parsed.fallbacks == 0 and parsed.sentences == len(trees)
  assert parsed.starts.shape == spelling.begins.shape
  assert parsed.starts[:1].all()
  first = spelling_lib.first_characters(spelling)
  opened = first[1:][parsed.starts[1:]].tolist()
  assert len(set(opened)) == len(opened)  # no character is cut
  assert set(opened) <= set(begins)
  return parsed.starts


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """A small trained tokenizer that spells much in bytes."""
  path = str(tmp_path_factory.mktemp('trained'))
  texts = ["the cat sat (in Paris), don't: it's\n\n it . "] * 20
  tokenizer_lib.train_tokenizer(texts, 310, path)
  return tokenizer_lib.load_tokenizer(path)


@pytest.mark.parametrize('kind', ['random cuts', 'tokenizer'])
def test_every_start_of_1000_responses_stands_at_a_leaf(
    kind: str, tokenizer: Any
) -> None:
  draw = random.Random(11)
  speller = spelling_lib.Speller(tokenizer)
  opened = tokens = 0
  for index in range(1_000):
    text, begins, leaves = _draw_text(draw)
    if kind == 'tokenizer':
      ids = tokenizer_lib.encode(tokenizer, text)
      spelling = speller([*ids, tokenizer.eos_token_id])
      assert spelling.text == text
    else:
      spelling = _draw_spelling(draw, text)
    trees = _draw_trees(draw, leaves)
    starts = _check(spelling, trees, begins, 1 + index % 12)
    opened, tokens = opened + starts.sum(), tokens + len(starts)
  assert 3_000 < opened < tokens / 2


def test_wrong_trees_never_raise() -> None:
  draw = random.Random(5)
  for _ in range(1_000):
    text, _, _ = _draw_text(draw)
    _, _, others = _draw_text(draw)
    spelling = _draw_spelling(draw, text)
    trees = [
        draw.choice([tree, None, '(S', _bracketed(Node('S', [tree])), 4])
        for tree in _draw_trees(draw, others)
    ]
    parsed = parsing.segment(
        spelling, trees, cutoff=draw.randint(1, 12), fallback='fixed', ngram=2
    )
    assert parsed.starts.shape == spelling.begins.shape
    assert parsed.starts[:1].all()
    assert 0 <= parsed.fallbacks <= parsed.sentences


def test_every_start_of_1000_real_responses_stands_at_a_leaf(
    tokenizer: Any,
) -> None:
  path = pathlib.Path(_DATA) / 'hh_harmless_1600.jsonl.gz'
  if not path.exists():
    pytest.skip(f'{path} is not there; set MA_RLHF_DATA to its folder')
  with gzip.open(path, 'rt') as file:
    rows = [json.loads(line) for line in file]
  texts = [row['chosen'].rpartition('Assistant:')[2] for row in rows[:1_000]]
  assert len(texts) == 1_000
  draw = random.Random(7)
  speller = spelling_lib.Speller(tokenizer)
  for index, text in enumerate(texts):
    # Words, with their last mark as a leaf of its own.
    pattern = re.compile(r'\w+|[^\w\s]+')
    found = list(pattern.finditer(text))
    trees = _draw_trees(draw, [match[0] for match in found])
    ids = tokenizer_lib.encode(tokenizer, text)
    begins = [match.start() for match in found]
    _check(speller(ids), trees, begins, 1 + index % 12)
