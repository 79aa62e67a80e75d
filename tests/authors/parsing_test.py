"""The boundaries of the authors' parsing rule."""

import re

import pytest

from tests import oracle
from tests.authors.parsing import AuthorsError, boundaries

CAT = (
    'The cat sat on the mat.',
    '(S (NP (DT The) (NN cat)) (VP (VBD sat) (PP (IN on) (NP (DT the) (NN mat)'
    '))) (. .))',
)


def _words(text: str) -> list[str]:
  """A token is a word with the blank before it, or a mark."""
  return re.findall(r'\n| ?\w+| ?[^\s\w]| ', text)


def _run(*sentences: tuple[str, str], width: int, cutoff: int) -> list[int]:
  return boundaries(sentences, width=width, cutoff=cutoff, tokenize=_words)


def test_small_nodes_close_macro_actions_and_single_leaves_join():
  # The cat | sat on the mat + the full stop | EOS; 2 and 4 tokens are below 5.
  assert _run(CAT, width=8, cutoff=5) == [0, 2, 7]
  # Strictly below: with 4 the verb phrase is opened, `on the mat` is small.
  # `sat` joins The cat.
  assert _run(CAT, width=8, cutoff=4) == [0, 3, 7]
  # Two columns of padding.
  assert _run(CAT, width=10, cutoff=2) == [0, 7, 9]


def test_newlines_are_not_counted():
  # Tokens I like tea . \n You like coffee more . eos; "You" is token 5.
  one = ('I like tea.', '(S (NN I) (VB like) (NN tea) (. .))')
  two = (
      'You like coffee more.',
      '(S (NN You) (VB like) (NN coffee) (RB more) (. .))',
  )
  assert _run(one, two, width=11, cutoff=2) == [0, 4, 9, 10]


def test_where_theirs_fails_an_error_says_so():
  with pytest.raises(AuthorsError, match='must end with EOS'):
    _run(CAT, width=7, cutoff=5)
  with pytest.raises(AuthorsError, match='no sentence'):
    _run(width=2, cutoff=5)
  bracket = ('See (it).', '(S (VB See) (P (L -LRB-) (N it) (R -RRB-)) (. .))')
  with pytest.raises(AuthorsError, match="'-LRB-' does not stand in"):
    _run(bracket, width=9, cutoff=3)
  with pytest.raises(AuthorsError, match='no part-of-speech node'):
    _run(('a b', '(S (X a) b)'), width=4, cutoff=2)
  with pytest.raises(AuthorsError, match='have 2 tokens, the sentence 3'):
    _run(('  a b', '(S (X a) (X b))'), width=4, cutoff=2)


def test_oracle_segmentation_parsing():
  for case in oracle.cases('segmentation_parsing.json'):
    run = lambda case=case: boundaries(
        [(s['sentence'], s['tree']) for s in case['sentences_parsed']],
        width=case['seq_len'] - case['prompt_len'],
        cutoff=case['parser_cutoff'],
        tokenize=case['tokenizer_calls'].__getitem__,
    )
    if case['error']:
      with pytest.raises(AuthorsError):
        run()
      continue
    got = [case['start'] + column for column in run()]
    assert got == case['ma_lengths'], case['id']
