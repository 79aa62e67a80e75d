"""Children: what is read, when they are ended, what is said when they fail."""

from collections.abc import Callable, Iterator
import json
import pathlib
import subprocess
import sys
import time

import pytest

from ma_rlhf_jax.planning import buffers, compiling, hlo, topology
from tests import tiny
from tests.planning import buffers_test, hlo_test

_FACTS = {
    'flops': 10,
    'resident_args': 7,
    'other_args': 2,
    'weights': [[3, 4]],
}
Make = Callable[..., compiling.Child]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
  """Children that run a line of Python instead of a compile."""
  made, real = [], subprocess.Popen

  def start(code: str, full: bool = False) -> compiling.Child:
    def popen(command: list[str], **kwargs: object) -> subprocess.Popen:
      path = repr(str(pathlib.Path(command[-1]).parent))
      line = f'import pathlib; path = pathlib.Path({path})\n{code}'
      return real([sys.executable, '-c', line], **kwargs)

    monkeypatch.setattr(subprocess, 'Popen', popen)
    child = compiling.Child(
        tiny.config(), topology.parse('v5e:1x1'), 'ppo/x', full=full
    )
    made.append(child)
    return child

  yield start
  for child in made:
    child.close()


def _wait(child: compiling.Child) -> None:
  end = time.monotonic() + 60
  while not child.done and time.monotonic() < end:
    time.sleep(0.02)
  assert child.done


_DUMPS = (
    ('m.after_optimizations-buffer-assignment.txt', buffers_test._TEXT),
    ('m.after_optimizations_after_buffer_assignment.txt', hlo_test.TEXT),
    ('m.debug_options', ''),
)
_WRITE = f"""
(path / 'dump').mkdir()
(path / 'facts.json').write_text({json.dumps(_FACTS)!r})
for name, text in {_DUMPS!r}:
  (path / 'dump' / name).write_text(text)
"""


def test_a_child_is_ended_once_buffers_are_assigned(make: Make) -> None:
  child = make(_WRITE + 'import time; time.sleep(600)')
  _wait(child)
  found = child.compiled()
  assert found.memory == buffers.parse(buffers_test._TEXT)
  assert (found.flops, found.resident_args, found.wire) == (10, 7, 0)
  assert found.weights == ((3, 4),)
  child.close()
  assert child._process.returncode != 0
  assert not child._path.exists()


def test_a_dump_that_is_still_written_is_waited_for(make: Make) -> None:
  cut = hlo_test.TEXT.rstrip().removesuffix('}')
  half = _WRITE.replace(repr(hlo_test.TEXT), repr(cut))
  assert half != _WRITE
  child = make(half + 'import time; time.sleep(600)')
  end = time.monotonic() + 60
  last = child._path / 'dump' / 'm.debug_options'
  while not last.is_file() and time.monotonic() < end:
    time.sleep(0.02)
  time.sleep(2 * compiling._SETTLED)
  assert not child.done
  with (last.parent / _DUMPS[1][0]).open('a') as file:
    file.write('}\n')
  _wait(child)


def test_a_full_compile_is_waited_for(make: Make) -> None:
  answer = json.dumps({'args': 1, 'temp': 20, 'out': 300})
  end = f"(path / 'answer.json').write_text({answer!r})"
  child = make(_WRITE + end, full=True)
  _wait(child)
  memory = child.compiled().memory
  assert (memory.args, memory.temp, memory.out) == (1, 20, 300)
  assert memory.largest  # of the dump


def test_what_does_not_fit_alone_has_no_memory(make: Make) -> None:
  child = make(
      f"(path / 'facts.json').write_text({json.dumps(_FACTS)!r})\n"
      "(path / 'answer.json').write_text('{\"required\": 99}')"
  )
  _wait(child)
  found = child.compiled()
  assert (found.memory, found.required) == (None, 99)


def test_a_failure_tells_the_last_lines(make: Make) -> None:
  child = make("raise ValueError('the reason')")
  _wait(child)
  with pytest.raises(compiling.CompileError, match='the reason') as caught:
    child.compiled()
  assert 'ppo/x' in str(caught.value)


def test_so_many_run_at_once_and_false_ends_the_others(make: Make) -> None:
  alive, most, taken = [], 0, []

  def start(code: str) -> Callable[[], compiling.Child]:
    def maker() -> compiling.Child:
      nonlocal most
      child = make(code)
      alive.append(child)
      most = max(most, sum(c._process.poll() is None for c in alive))
      return child

    return maker

  def take(child: compiling.Child) -> bool:
    taken.append(child)
    return len(taken) < 2

  quick, never = start('pass'), start('import time; time.sleep(600)')
  compiling.run_all([quick, quick, never, quick], 2, take)
  assert len(taken) == 2 and most <= 2
  assert all(child._process.poll() is not None for child in alive)


def test_what_cannot_be_counted_is_a_doubt() -> None:
  assert compiling.doubts(hlo.parse(hlo_test.TEXT)) == ()
  # The bound of the loop over layers is no number, and one operand is lost.
  text = hlo_test.TEXT.replace('%t, %limit)', '%t, %t)')
  text = text.replace('tuple(%copied, %a)', 'tuple(%copied, %lost)')
  loop, lost = compiling.doubts(hlo.parse(text))
  assert 'inner' in loop and 'lost' in lost
