"""Rules of the host, from token ids to starts."""

from collections.abc import Callable
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
import pytest

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.macro import host
from tests import tiny
from tests.macro.text_rules_test import needs_text

SETTINGS = {
    'termination': 'parsing',
    'parser': '',
    'parse_cutoff': 4,
    'parse_fallback': 'fixed',
    'parse_workers': 0,
    'ngram': 2,
}
# ids 3, 4, 5, ... are a, b, c, ...; 1 is EOS, without characters.
ABCD = [3, 4, 5, 6, 1]
DCBA = [6, 5, 4, 3, 1]

# `count` keeps a list of what it was asked.
TOY = """
import json, os, sys, time
asked = []

def tree(text):
  middle = len(text) // 2
  part = lambda x: '(N ' + ' '.join(x) + ')'
  return f'(S {part(text[:middle])} {part(text[middle:])} (X))'

def count(texts):
  asked.append(list(texts))
  return [[tree(text)] for text in texts]

def raises(texts):
  if any('d' == text[0] for text in texts):
    raise ArithmeticError('not today')
  return count(texts)

def hangs(texts):
  asked.append(list(texts))
  if any('d' == text[0] for text in texts):
    time.sleep(100)
  return [[tree(text)] for text in texts]

def dies(texts):
  if any('d' == text[0] for text in texts):
    os._exit(3)
  return count(texts)

def short(texts):
  return count(texts)[1:]

def strings(texts):
  return [tree(text) for text in texts]

def nothing(texts):
  return None

not_callable = 3

if __name__ == '__main__':
  print('hello', flush=True)
  for line in sys.stdin:
    text = json.loads(line)['text']
    print('noise', flush=True)
    print(json.dumps({'trees': globals()[sys.argv[1]]([text])[0]}), flush=True)
"""


@pytest.fixture(autouse=True)
def toy(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
  """The module `toy`, and limits that a test can wait for."""
  path = tmp_path / 'toy.py'
  path.write_text(TOY)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, 'toy', raising=False)
  monkeypatch.setattr(host, 'ANSWER_SECONDS', 1.0)
  monkeypatch.setattr(host, 'START_SECONDS', 20.0)
  monkeypatch.setattr(host, 'BATCH_SECONDS', 0.5)
  return path


def _termination(**fields: Any) -> host.HostTermination:
  settings = host.HostSettings(**SETTINGS | fields)
  return host.HostTermination(settings, tiny.Tokenizer())


def _batch(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """Rows with a column of padding, and a pad id that means something else."""
  width = max(map(len, rows)) + 1
  tokens = np.full((len(rows), width), 9, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for index, row in enumerate(rows):
    tokens[index, : len(row)] = row
    mask[index, : len(row)] = True
  return tokens, mask


def _ones(starts: np.ndarray) -> list[list[int]]:
  return starts.astype(int).tolist()


def test_trees_of_a_function_become_starts() -> None:
  with _termination(parser='toy:count') as termination:
    starts, metrics = termination(*_batch(ABCD, [3], [1], []))
  assert _ones(starts) == [
      [1, 0, 1, 0, 0, 0],  # ab | cd and EOS
      [1, 0, 0, 0, 0, 0],
      [1, 0, 0, 0, 0, 0],  # EOS alone
      [0, 0, 0, 0, 0, 0],
  ]
  assert starts.dtype == bool
  # Two texts of one sentence, four responses; (N ) of `a` has no leaf.
  assert metrics == {'macro/sentences': 0.5, 'macro/fallback': 0.0}


def test_the_mask_says_where_a_response_is() -> None:
  tokens = np.array([[7, 3, 4, 8, 5, 6]], np.int32)
  mask = np.array([[0, 1, 1, 0, 1, 1]], bool)
  starts, _ = _termination(parser='toy:count')(tokens, mask)
  assert _ones(starts) == [[0, 1, 0, 0, 1, 0]]


def test_equal_responses_are_parsed_once() -> None:
  termination = _termination(parser='toy:count')
  # Without EOS it is another response of the same text.
  first, _ = termination(*_batch(ABCD, DCBA, ABCD, [3, 4, 5, 6]))
  second, metrics = termination(*_batch(ABCD, DCBA, [3, 4]))
  assert sys.modules['toy'].asked == [['abcd', 'dcba'], ['ab']]
  np.testing.assert_array_equal(first[0], second[0])
  assert metrics == {'macro/sentences': 1.0, 'macro/fallback': 0.0}


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(host, 'CACHE_SIZE', 2)
  termination = _termination(parser='toy:count')
  batch = _batch(ABCD, DCBA, [3, 4], [4, 5])
  starts, _ = termination(*batch)
  assert len(termination._kept) == 2
  np.testing.assert_array_equal(termination(*batch)[0], starts)


@pytest.mark.parametrize('function', ['raises', 'hangs'])
def test_a_function_that_fails_does_not_stop_a_call(
    function: str, caplog: pytest.LogCaptureFixture
) -> None:
  termination = _termination(parser=f'toy:{function}')
  begin = time.monotonic()
  starts, metrics = termination(*_batch(ABCD, DCBA))
  again, _ = termination(*_batch(ABCD, [6, 5, 4]))
  assert time.monotonic() - begin < 5
  assert _ones(starts[1:]) == [[1, 0, 1, 0, 1, 0]]  # every 2 tokens
  assert _ones(again[1:]) == [[1, 0, 1, 0, 0, 0]]
  if function == 'raises':  # the other text is parsed all the same
    assert metrics == {'macro/sentences': 1.0, 'macro/fallback': 0.5}
    assert "ArithmeticError('not today')" in caplog.text
  else:
    assert metrics == {'macro/sentences': 1.0, 'macro/fallback': 1.0}
    assert 'no answer in' in caplog.text
    assert sys.modules['toy'].asked == [['abcd', 'dcba']]
  assert len(caplog.records) == 1


@pytest.mark.parametrize('function', ['short', 'strings', 'nothing'])
def test_wrong_answers_are_failures(function: str) -> None:
  _, metrics = _termination(parser=f'toy:{function}')(*_batch(ABCD, DCBA))
  assert metrics == {'macro/sentences': 1.0, 'macro/fallback': 1.0}


def _command(toy: pathlib.Path, function: str) -> str:
  return f'command: {sys.executable} {toy} {function}'


PROCESSES: dict[str, Callable[[pathlib.Path, str], str]] = {
    'command': _command,
    'function': lambda toy, function: f'toy:{function}',
}


@pytest.mark.parametrize('kind', PROCESSES)
def test_processes_give_the_same_starts(kind: str, toy: pathlib.Path) -> None:
  draw = np.random.default_rng(0)
  sizes = draw.integers(1, 30, size=40)
  rows = [draw.integers(3, 20, size).tolist() for size in sizes]
  want, wanted = _termination(parser='toy:count')(*_batch(*rows))
  parser = PROCESSES[kind](toy, 'count')
  with _termination(parser=parser, parse_workers=2) as termination:
    starts, metrics = termination(*_batch(*rows))
  np.testing.assert_array_equal(starts, want)
  assert metrics == wanted and metrics['macro/fallback'] == 0


@pytest.mark.parametrize('kind', PROCESSES)
@pytest.mark.parametrize('function', ['raises', 'hangs', 'dies'])
def test_a_process_that_fails_does_not_stop_a_call(
    kind: str,
    function: str,
    toy: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
  parser = PROCESSES[kind](toy, function)
  with _termination(parser=parser, parse_workers=1) as termination:
    begin = time.monotonic()
    starts, metrics = termination(*_batch(ABCD, DCBA, [3, 4]))
  # Who is late is not asked again.
  assert time.monotonic() - begin < host.START_SECONDS
  # The text behind the one that failed is parsed by the next process.
  assert metrics == {'macro/sentences': 1.0, 'macro/fallback': 1 / 3}
  assert _ones(starts) == [
      [1, 0, 1, 0, 0, 0],
      [1, 0, 1, 0, 1, 0],
      [1, 0, 0, 0, 0, 0],
  ]
  assert len(caplog.records) == 1


def test_a_process_that_keeps_dying_is_given_up(toy: pathlib.Path) -> None:
  parser = _command(toy, 'dies')
  with _termination(parser=parser) as termination:
    rows = [[6, i, 1] for i in range(3, 9)]
    _, metrics = termination(*_batch(*rows))
    assert metrics['macro/fallback'] == 1.0
    assert termination._parser._processes[0]._deaths == host.MAX_DEATHS


def test_long_lines_do_not_block(toy: pathlib.Path) -> None:
  # Longer than the pipe of either side.
  row = [3 + i % 17 for i in range(90_000)]
  with _termination(parser=_command(toy, 'count')) as termination:
    _, metrics = termination(*_batch(row))
  assert metrics == {'macro/sentences': 1.0, 'macro/fallback': 0.0}


def test_closing_ends_the_processes(toy: pathlib.Path) -> None:
  termination = _termination(parser=_command(toy, 'count'), parse_workers=2)
  running = [p._process for p in termination._parser._processes]
  assert [process.poll() for process in running] == [None, None]
  termination.close()
  assert [process.poll() for process in running] == [0, 0]


def _write(path: pathlib.Path, *lines: str) -> str:
  path.write_text('\n'.join(lines))
  return str(path)


def test_trees_of_a_file_are_found_by_text(tmp_path: pathlib.Path) -> None:
  row = {'text': 'abcd', 'trees': ['(S (N a b) (N c d))'], 'other': 1}
  path = _write(tmp_path / 'trees.jsonl', json.dumps(row), '')
  starts, metrics = _termination(parser=path)(*_batch(ABCD, DCBA))
  assert _ones(starts) == [[1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0]]
  assert metrics == {'macro/sentences': 1.0, 'macro/fallback': 0.5}


@pytest.mark.parametrize(
    'line', ['{"text"', '[]', '{"text": "a"}', '{"text": [], "trees": []}']
)
def test_a_malformed_line_is_named(line: str, tmp_path: pathlib.Path) -> None:
  good = '{"text": "a", "trees": [null]}'
  path = _write(tmp_path / 'trees.jsonl', good, line)
  with pytest.raises(ValueError, match=r"^macro.parser='.*jsonl': line 2 "):
    _termination(parser=path)


@pytest.mark.parametrize(
    'fields,error,message',
    [
        ({'termination': 'fixed'}, ValueError, 'macro.termination='),
        ({'parse_cutoff': 0}, ValueError, 'macro.parse_cutoff=0'),
        ({'parse_fallback': 'two'}, ValueError, "macro.parse_fallback='two'"),
        ({'parse_workers': -1}, ValueError, 'macro.parse_workers=-1'),
        ({'ngram': -1}, ValueError, 'macro.ngram=-1'),
        ({'parser': ''}, ValueError, "macro.parser=''"),
        ({'parser': 'toy'}, ValueError, "macro.parser='toy'"),
        ({'parser': 'command: '}, ValueError, "macro.parser='command: '"),
        ({'parser': 'command: "x'}, ValueError, 'macro.parser='),
        ({'parser': 'command: no-such-x'}, ValueError, "program 'no-such-x'"),
        ({'parser': 'no_such_x:f'}, ImportError, "macro.parser='no_such_x:f'"),
        ({'parser': 'toy:missing'}, ValueError, "macro.parser='toy:missing'"),
        ({'parser': 'toy:not_callable'}, ValueError, 'macro.parser='),
        ({'parser': '/no/trees.jsonl'}, OSError, "macro.parser='/no/trees"),
    ],
)
def test_what_is_wrong_is_said_at_the_start(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
  with pytest.raises(error, match='^macro.*') as raised:
    _termination(**{'parser': 'toy:count'} | fields)
  assert message in str(raised.value)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_command_that_does_not_answer_is_refused(workers: int) -> None:
  parser = f'command: {sys.executable} -c 1'
  with pytest.raises(ValueError, match='ended with exit code 0; for each line'):
    _termination(parser=parser, parse_workers=workers)
  with pytest.raises(ValueError, match='ended with exit code 1; for each line'):
    _termination(parser='toy:missing', parse_workers=workers)


def test_python_needs_no_parser(tmp_path_factory: Any) -> None:
  folder = str(tmp_path_factory.mktemp('trained'))
  tokenizer_lib.train_tokenizer(
      ['x = (1, 2); y = 3 for the win'] * 9, 290, folder
  )
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  settings = host.HostSettings(**SETTINGS | {'termination': 'python'})
  termination = host.HostTermination(settings, tokenizer)
  ids = tokenizer_lib.encode(tokenizer, 'x = (1,\n 2); y = 3\nfor')
  starts, metrics = termination(*_batch([*ids, tokenizer.eos_token_id]))
  at = [*np.flatnonzero(starts[0]).tolist(), len(ids)]
  parts = [tokenizer.decode(ids[a:b]) for a, b in zip(at, at[1:], strict=False)]
  assert [p.strip() for p in parts] == ['x = (1,\n 2);', 'y = 3', 'for']
  assert metrics == {}


@needs_text
@pytest.mark.parametrize('rule', ['sentences', 'clauses'])
def test_text_rules_are_served(rule: str) -> None:
  starts, metrics = _termination(termination=rule)(*_batch(ABCD, [1]))
  assert _ones(starts) == [[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
  assert metrics == {} and rule in host.NAMES
