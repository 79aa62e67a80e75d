"""One process of a parser: what it says, and how it ends."""

import pathlib
import time

import pytest

from ma_rlhf_jax.macro import parser_process
from tests.macro.toys import (
    ABCD,
    batch,
    command,
    ones,
    talker,
    termination_of,
    told,
)

pytestmark = pytest.mark.usefixtures('toy')


def test_answers_to_other_texts_are_passed_over(toy: pathlib.Path) -> None:
  other = "print(json.dumps({'text': 'no', 'trees': []}), flush=True)"
  mine = "print(json.dumps({'text': text, **json.loads(answer)}), flush=True)"
  parser = talker(toy, f'{mine}; {mine}; {other}')
  with termination_of(parser=parser, parse_cutoff=9) as termination:
    rows = [[3 + i, 4 + i, 5 + i, 1] for i in range(4)]
    starts, counts = termination(*batch(*rows))
  assert told(counts)['macro/fallback'] == 0.0
  assert ones(starts) == [[1, 0, 0, 0, 0]] * 4


def test_what_is_said_after_an_answer_does_not_answer_the_next_text(
    toy: pathlib.Path,
) -> None:
  parser = talker(toy, 'print(answer, flush=True); print(answer, flush=True)')
  with termination_of(parser=parser, parse_cutoff=9) as termination:
    (process,) = termination._parser._processes
    for row in ([3, 4, 5, 1], [9, 8, 7, 1]):
      while process._lines.empty():  # the second answer to the text before
        time.sleep(0.01)
      _, counts = termination(*batch(row))
      assert told(counts)['macro/fallback'] == 0.0


def test_a_child_that_holds_the_pipe_is_not_waited_for(
    toy: pathlib.Path,
) -> None:
  outlived = toy.with_name('outlived')
  child = ['sh', '-c', f'sleep 30; touch {outlived}']
  start = f'subprocess.Popen({child}, start_new_session=True)'
  hang = (
      f"{start}; sys.exit() if text != 'A test.' else print(answer, flush=True)"
  )
  with termination_of(parser=talker(toy, hang)) as rule:
    _, counts = rule(*batch(ABCD))
  assert not outlived.exists()
  assert told(counts)['macro/fallback'] == 1.0


def test_a_process_that_keeps_dying_is_given_up(toy: pathlib.Path) -> None:
  parser = command(toy, 'dies')
  with termination_of(parser=parser) as termination:
    rows = [[6, i, 1] for i in range(3, 9)]
    _, counts = termination(*batch(*rows))
    assert told(counts)['macro/fallback'] == 1.0
    assert (
        termination._parser._processes[0]._deaths == parser_process.MAX_DEATHS
    )


def test_long_lines_do_not_block(toy: pathlib.Path) -> None:
  # Longer than the pipe of either side.
  row = [3 + i % 17 for i in range(90_000)]
  with termination_of(parser=command(toy, 'count')) as termination:
    _, counts = termination(*batch(row))
  assert told(counts) == {'macro/sentences': 1.0, 'macro/fallback': 0.0}
