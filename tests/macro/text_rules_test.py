"""Where texts break, and that no text stops the rules."""

import importlib.util
import random
import sys

import pytest

from ma_rlhf_jax.macro import text_rules

needs_text = pytest.mark.skipif(
    importlib.util.find_spec('tensorflow_text') is None,
    reason="needs tensorflow-text: pip install -e '.[text]'",
)
RULES = [
    pytest.param('sentences', marks=needs_text),
    pytest.param('clauses', marks=needs_text),
    'python',
]


def _parts(rule: str, text: str) -> list[str]:
  """The text cut at the offsets of the rule."""
  (offsets,) = text_rules.RULES[rule]([text])
  at = [*offsets, len(text)]
  return [text[a:b] for a, b in zip(at, at[1:], strict=False)]


@needs_text
@pytest.mark.parametrize(
    'parts',
    [
        ['Hi there! ', 'How are you? ', 'I am.'],
        ['No end\n', 'of a line\n\n\n \t', 'and another'],
        ['He paid 3.5 dollars, e.g. to Mr. Smith. ', 'Then he left.'],
        ['He said "Hi." ', 'She (Ann.) left. ', '(Really.) ', '“No.” ', 'Yes.'],
        ['Ça va ? ', 'Très bien ! ', '👍🏽 Voilà.'],
        ['日本語です。', 'はい。'],
        ['One'],
    ],
)
def test_sentences(parts: list[str]) -> None:
  assert _parts('sentences', ''.join(parts)) == parts


@needs_text
@pytest.mark.parametrize(
    'parts',
    [
        ['If you go, ', 'I stay; ', 'he sleeps: ', 'see?'],
        ['Cats sleep ', 'and dogs run ', 'because they can. ', 'But why?'],
        ['It cost 3,000 at 10:30, ', 'or more'],
        ['Well — ', 'no -- ', 'a well-known thing - ', 'yes'],
        ['éé, ', 'ok ', 'while you say “so,” ', 'and éé\n', 'go'],
        ['An android ', 'AND a butler'],
    ],
)
def test_clauses(parts: list[str]) -> None:
  assert _parts('clauses', ''.join(parts)) == parts


@needs_text
def test_clauses_end_with_their_sentence() -> None:
  text = 'Go. Stay, he said.\nNow'
  (ends,), (clauses,) = text_rules.sentences([text]), text_rules.clauses([text])
  assert ends == [0, 4, 19]
  assert clauses == [0, 4, 10, 19]


@pytest.mark.parametrize(
    'parts',
    [
        ['import os; ', 'x = 1;\n', 'y = 2'],
        ['@dec\n', 'def f(a,\n      b):\n  ', 'return {1: 2,\n 3: 4}\n\n', 'z'],
        ['# one\n', '# two\n', 'x = 1  # three\n', 'if x:\n\t', 'pass\n'],
        ['s = """a;\nb"""; ', "t = 'x;y'\n", 'u = x + \\\n  y\n', 'v'],
        ['f(a)[1:2] ; ', 'é = "👍🏽"; ', 'g()'],
        ['x = {\n  1: [2,\n 3]}\n', 'y'],
    ],
)
def test_python_is_cut_at_logical_lines(parts: list[str]) -> None:
  assert _parts('python', ''.join(parts)) == parts


@pytest.mark.parametrize(
    'parts',
    [
        ['a = 1; ', 'b = (2,\n ', '3,\n ', '4'],  # open to the end
        ['f(1,\n  2)\n', 's = """abc\n', 'def; x\n\n', 'ghi'],
        ['def f():\n    ', 'a\n  ', 'b\n ', 'c; d'],  # dedent to nowhere
        ['x = 1)\n', 'y = 2'],
    ],
)
def test_broken_python_keeps_what_was_found(parts: list[str]) -> None:
  assert _parts('python', ''.join(parts)) == parts


def test_fences_keep_prose_and_program_apart() -> None:
  parts = [
      'Here is (a program\n\n',
      '```python\n',
      'x = (1,\n     2)\n',
      'y = 3\n',
      '```\n',
      'It sets x,\n',
      'and y.',
  ]
  assert _parts('python', ''.join(parts)) == parts


def test_windows_lines_are_lines() -> None:
  assert _parts('python', 'x = 1\r\ny = 2\r\n') == ['x = 1\r\n', 'y = 2\r\n']


@pytest.mark.parametrize('rule', RULES)
def test_no_text_has_no_break(rule: str) -> None:
  assert text_rules.RULES[rule]([]) == []
  assert text_rules.RULES[rule](['', ' ', '\n\n']) == [[], [], []]


@pytest.mark.parametrize('rule', RULES)
def test_texts_do_not_touch_each_other(rule: str) -> None:
  texts = ['a = 1; b (', 'é. So, and\nc', '', 'x = """', 'y']
  alone = [text_rules.RULES[rule]([text])[0] for text in texts]
  assert text_rules.RULES[rule](texts) == alone


@pytest.mark.parametrize('rule', RULES)
def test_no_text_stops_a_rule(rule: str) -> None:
  draw = random.Random(0)
  pieces = [
      *'()[]{}"\'\\;#?$!:@,.-—”é', '\n', '\n', ' ', '  ', '\t', '\r', '\r\n',
      '\0', '\ufeff', '\u2028', '\x0c', '\ufffd', '"""', "'''", '\\\n', '```',
      '```python\n', 'def', 'f"', '0x', '1.', 'and', 'because',
      '👍🏽', '日本。',
  ]  # fmt: skip
  texts = [
      ''.join(draw.choices(pieces, k=draw.randrange(40))) for _ in range(2_000)
  ]
  found = text_rules.RULES[rule](texts)
  for text, offsets in zip(texts, found, strict=True):
    assert offsets == sorted(set(offsets))
    assert all(not text[offset].isspace() for offset in offsets)
  assert sum(map(len, found)) > 4_000


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, 'tensorflow_text', None)
  text_rules._tensorflow_text.cache_clear()
  with pytest.raises(ImportError, match=r"pip install -e '.\[text\]'"):
    text_rules.check('clauses')
  text_rules.check('python')
  monkeypatch.undo()
  text_rules._tensorflow_text.cache_clear()
