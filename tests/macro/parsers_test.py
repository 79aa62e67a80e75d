"""Parsers of the user, in this process, in others and in files."""

from collections.abc import Callable
import json
import pathlib
import sys
import time

import numpy as np
import pytest

from ma_rlhf_jax.macro import parsers
from tests.macro.toys import ABCD, DCBA, batch, ones, termination_of, told

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
    assert f'no answer in {parsers.ANSWER_SECONDS:.0f} s' in caplog.text
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


# Parsers that talk; MODE says what is printed for each text.
_TALKER = """
import json, os, subprocess, sys, time
print(json.dumps({'event': 'loaded'}), flush=True)
for line in sys.stdin:
  text = json.loads(line)['text']
  tree = f'(S (N {text[:1]}) (N {text[1:]}))'
  answer = json.dumps({'trees': [tree]})
  print(json.dumps({'progress': 1}), flush=True)
  MODE
"""


def _talker(toy: pathlib.Path, mode: str) -> str:
  script = toy.with_name('talker.py')
  script.write_text(_TALKER.replace('MODE', mode))
  return f'command: {sys.executable} {script}'


def test_answers_to_other_texts_are_passed_over(toy: pathlib.Path) -> None:
  other = "print(json.dumps({'text': 'no', 'trees': []}), flush=True)"
  mine = "print(json.dumps({'text': text, **json.loads(answer)}), flush=True)"
  parser = _talker(toy, f'{mine}; {mine}; {other}')
  with termination_of(parser=parser, parse_cutoff=9) as termination:
    rows = [[3 + i, 4 + i, 5 + i, 1] for i in range(4)]
    starts, counts = termination(*batch(*rows))
  assert told(counts)['macro/fallback'] == 0.0
  assert ones(starts) == [[1, 0, 0, 0, 0]] * 4


def test_what_is_said_after_an_answer_does_not_answer_the_next_text(
    toy: pathlib.Path,
) -> None:
  parser = _talker(toy, 'print(answer, flush=True); print(answer, flush=True)')
  with termination_of(parser=parser, parse_cutoff=9) as termination:
    (process,) = termination._parser._processes
    for row in ([3, 4, 5, 1], [9, 8, 7, 1]):
      while process._lines.empty():  # the second answer to the text before
        time.sleep(0.01)
      _, counts = termination(*batch(row))
      assert told(counts)['macro/fallback'] == 0.0


def test_a_command_that_gives_no_trees_is_refused(toy: pathlib.Path) -> None:
  with pytest.raises(ValueError, match="'command: cat' gives no trees"):
    termination_of(parser='command: cat')


def test_a_child_that_holds_the_pipe_is_not_waited_for(
    toy: pathlib.Path,
) -> None:
  outlived = toy.with_name('outlived')
  child = ['sh', '-c', f'sleep 30; touch {outlived}']
  start = f'subprocess.Popen({child}, start_new_session=True)'
  hang = (
      f"{start}; sys.exit() if text != 'A test.' else print(answer, flush=True)"
  )
  with termination_of(parser=_talker(toy, hang)) as rule:
    _, counts = rule(*batch(ABCD))
  assert not outlived.exists()
  assert told(counts)['macro/fallback'] == 1.0


def test_a_process_that_keeps_dying_is_given_up(toy: pathlib.Path) -> None:
  parser = _command(toy, 'dies')
  with termination_of(parser=parser) as termination:
    rows = [[6, i, 1] for i in range(3, 9)]
    _, counts = termination(*batch(*rows))
    assert told(counts)['macro/fallback'] == 1.0
    assert termination._parser._processes[0]._deaths == parsers.MAX_DEATHS


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
  parser = _talker(toy, mode)
  with termination_of(parser=parser, parse_workers=2) as termination:
    first, second = termination._parser._processes
    held.write_text(str(first._process.pid))
    rows = [[3 + i % 17, 3 + i // 17, 4] for i in range(60)]
    _, counts = termination(*batch(*rows))
    assert second.given_up and not first.given_up
  # Two texts of the one that died twice for each.
  assert told(counts)['macro/fallback'] == pytest.approx(2 / 60)


def test_long_lines_do_not_block(toy: pathlib.Path) -> None:
  # Longer than the pipe of either side.
  row = [3 + i % 17 for i in range(90_000)]
  with termination_of(parser=_command(toy, 'count')) as termination:
    _, counts = termination(*batch(row))
  assert told(counts) == {'macro/sentences': 1.0, 'macro/fallback': 0.0}


def test_closing_ends_the_processes(toy: pathlib.Path) -> None:
  termination = termination_of(parser=_command(toy, 'count'), parse_workers=2)
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
