"""Parsers of the user, in this process, in others and in files."""

from collections.abc import Callable
import json
import pathlib
import sys

import numpy as np
import pytest

from ma_rlhf_jax.macro import parser_process
from tests.macro.toys import (
    ABCD,
    DCBA,
    batch,
    command,
    ones,
    talker,
    termination_of,
    told,
)

pytestmark = pytest.mark.usefixtures('toy')


def test_trees_of_a_function_become_starts() -> None:
  with termination_of(parser='toy:count') as termination:
    starts, counts = termination(*batch(ABCD, [3], [1], []))
  assert ones(starts) == [
      [1, 0, 1, 0, 0, 0],  # ab | cd and EOS
      [1, 0, 0, 0, 0, 0],
      [1, 0, 0, 0, 0, 0],  # EOS alone
      [0, 0, 0, 0, 0, 0],
  ]
  assert starts.dtype == bool
  # Two texts of one sentence, four responses; (N ) of `a` has no leaf.
  assert told(counts) == {'macro/sentences': 0.5, 'macro/fallback': 0.0}


@pytest.mark.parametrize('function', ['raises', 'hangs'])
def test_a_function_that_fails_does_not_stop_a_call(
    function: str, caplog: pytest.LogCaptureFixture
) -> None:
  termination = termination_of(parser=f'toy:{function}')
  starts, counts = termination(*batch(ABCD, DCBA))
  again, _ = termination(*batch(ABCD, [6, 5, 4]))
  assert ones(starts[1:]) == [[1, 0, 1, 0, 1, 0]]  # every 2 tokens
  assert ones(again[1:]) == [[1, 0, 1, 0, 0, 0]]
  if function == 'raises':  # the other text is parsed all the same
    assert told(counts) == {'macro/sentences': 1.0, 'macro/fallback': 0.5}
    assert "ArithmeticError('not today')" in caplog.text
  else:
    assert told(counts) == {'macro/sentences': 1.0, 'macro/fallback': 1.0}
    assert 'no answer in' in caplog.text
    assert sys.modules['toy'].asked == [['abcd', 'dcba']]
  assert len(caplog.records) == 1


@pytest.mark.parametrize('function', ['short', 'strings', 'nothing'])
def test_wrong_answers_are_failures(function: str) -> None:
  _, counts = termination_of(parser=f'toy:{function}')(*batch(ABCD, DCBA))
  assert told(counts) == {'macro/sentences': 1.0, 'macro/fallback': 1.0}


PROCESSES: dict[str, Callable[[pathlib.Path, str], str]] = {
    'command': command,
    'function': lambda toy, function: f'toy:{function}',
}


@pytest.mark.parametrize('kind', PROCESSES)
def test_processes_give_the_same_starts(kind: str, toy: pathlib.Path) -> None:
  draw = np.random.default_rng(0)
  sizes = draw.integers(1, 30, size=40)
  rows = [draw.integers(3, 20, size).tolist() for size in sizes]
  want, wanted = termination_of(parser='toy:count')(*batch(*rows))
  parser = PROCESSES[kind](toy, 'count')
  with termination_of(parser=parser, parse_workers=2) as termination:
    starts, counts = termination(*batch(*rows))
  np.testing.assert_array_equal(starts, want)
  assert told(counts) == told(wanted) and told(counts)['macro/fallback'] == 0


@pytest.mark.parametrize('kind', PROCESSES)
@pytest.mark.parametrize('function', ['raises', 'hangs', 'dies'])
def test_a_process_that_fails_does_not_stop_a_call(
    kind: str,
    function: str,
    toy: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
  parser = PROCESSES[kind](toy, function)
  with termination_of(parser=parser, parse_workers=1) as termination:
    starts, counts = termination(*batch(ABCD, DCBA, [3, 4]))
  if function == 'hangs':  # who is late is not asked again
    assert f'no answer in {parser_process.ANSWER_SECONDS:.0f} s' in caplog.text
  # The text behind the one that failed is parsed by the next process.
  assert told(counts) == {
      'macro/sentences': 1.0,
      'macro/fallback': pytest.approx(1 / 3),
  }
  assert ones(starts) == [
      [1, 0, 1, 0, 0, 0],
      [1, 0, 1, 0, 1, 0],
      [1, 0, 0, 0, 0, 0],
  ]
  assert len(caplog.records) == 1


def test_a_command_that_gives_no_trees_is_refused(toy: pathlib.Path) -> None:
  with pytest.raises(ValueError, match="'command: cat' gives no trees"):
    termination_of(parser='command: cat')


def test_one_that_keeps_dying_takes_no_text_from_another(
    toy: pathlib.Path,
) -> None:
  # The first one holds the file; whoever else is asked a text dies.
  held = toy.with_name('held')
  mode = (
      f"os.path.exists({str(held)!r}) and text != 'A test.' "
      "and str(os.getpid()) != open('HELD').read() and os._exit(3); "
      'time.sleep(0.02); print(answer, flush=True)'
  ).replace('HELD', str(held))
  parser = talker(toy, mode)
  with termination_of(parser=parser, parse_workers=2) as termination:
    first, second = termination._parser._processes
    held.write_text(str(first._process.pid))
    rows = [[3 + i % 17, 3 + i // 17, 4] for i in range(60)]
    _, counts = termination(*batch(*rows))
    assert second.given_up and not first.given_up
  # Two texts of the one that died twice for each.
  assert told(counts)['macro/fallback'] == pytest.approx(2 / 60)


def test_closing_ends_the_processes(toy: pathlib.Path) -> None:
  termination = termination_of(parser=command(toy, 'count'), parse_workers=2)
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
  starts, counts = termination_of(parser=path)(*batch(ABCD, DCBA))
  assert ones(starts) == [[1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0]]
  assert told(counts) == {'macro/sentences': 1.0, 'macro/fallback': 0.5}


@pytest.mark.parametrize(
    'line', ['{"text"', '[]', '{"text": "a"}', '{"text": [], "trees": []}']
)
def test_a_malformed_line_is_named(line: str, tmp_path: pathlib.Path) -> None:
  good = '{"text": "a", "trees": [null]}'
  path = _write(tmp_path / 'trees.jsonl', good, line)
  with pytest.raises(ValueError, match=r"^macro.parser='.*jsonl': line 2 "):
    termination_of(parser=path)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_command_that_does_not_answer_is_refused(workers: int) -> None:
  parser = f'command: {sys.executable} -c 1'
  with pytest.raises(ValueError, match='ended with exit code 0; for each line'):
    termination_of(parser=parser, parse_workers=workers)
  with pytest.raises(ValueError, match='ended with exit code 1; for each line'):
    termination_of(parser='toy:missing', parse_workers=workers)
