"""The output file: whole or not there, and nothing that was done is lost."""

import json
import pathlib
import subprocess
import sys

import pytest

from ma_rlhf_jax.data import outputs


def _rows(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_finished_in_any_order_come_out_in_that_of_the_input(
    tmp_path: pathlib.Path,
):
  path, partial = tmp_path / 'o.jsonl', tmp_path / 'o.jsonl.partial'
  output = outputs.Output(str(path))
  output.add(2, [{'n': 20}, {'n': 21}])
  output.add(0, [{'n': 0, 'text': 'é'}])
  output.flush()
  assert not path.exists() and len(output) == 2
  assert [row['n'] for row in _rows(partial)] == [20, 21, 0]
  output.add(1, [{'n': 10}])
  output.commit()
  assert not partial.exists()
  assert [row['n'] for row in _rows(path)] == [0, 10, 20, 21]
  assert '"é"' in path.read_text()


def test_abandoned_rows_stay_in_the_partial_file(tmp_path: pathlib.Path):
  path, partial = tmp_path / 'o.jsonl', tmp_path / 'o.jsonl.partial'
  path.write_text('before')
  output = outputs.Output(str(path))
  output.add(1, [{'n': 1}])
  told = output.abandon()
  assert path.read_text() == 'before' and _rows(partial) == [{'n': 1}]
  assert told == (
      f'{path} is not written; what is done of it (1 rows of the input) is in '
      f'{partial}, in the order it was finished'
  )


def test_nothing_is_left_of_an_output_without_rows(tmp_path: pathlib.Path):
  assert outputs.Output(str(tmp_path / 'o.jsonl')).abandon() == ''
  assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced_on_demand_only(
    tmp_path: pathlib.Path,
):
  path = tmp_path / 'o.jsonl'
  path.write_text('before')
  with pytest.raises(FileExistsError, match='o.jsonl is there already; name'):
    outputs.check(str(path), overwrite=False)
  outputs.check(str(path), overwrite=True)
  outputs.check(str(tmp_path / 'new.jsonl'), overwrite=False)


def test_folders_are_refused(tmp_path: pathlib.Path):
  with pytest.raises(IsADirectoryError, match='is a folder; name a file in it'):
    outputs.check(str(tmp_path), overwrite=True)
  with pytest.raises(FileNotFoundError, match='there is no folder'):
    outputs.check(str(tmp_path / 'none' / 'o.jsonl'), overwrite=False)


def test_any_row_can_be_written():
  assert outputs.dump({'a': 'é😀\n'}) == '{"a": "é😀\\n"}'
  half = outputs.dump({'a': '\ud83d'})  # of a pair, in a field of the user
  assert half == '{"a": "\\ud83d"}' and half.encode()


def test_a_number_that_json_lacks_is_not_written():
  with pytest.raises(ValueError, match='not JSON compliant'):
    outputs.dump({'score': float('nan')})


def test_the_input_is_never_written_over(tmp_path: pathlib.Path):
  source = tmp_path / 'o.jsonl.partial'
  source.write_text('rows')
  for overwrite in (False, True):
    with pytest.raises(ValueError, match='rename it, or name another output'):
      outputs.check(str(tmp_path / 'o.jsonl'), overwrite, str(source))
  link = tmp_path / 'link.jsonl'
  link.symlink_to(source)
  with pytest.raises(ValueError, match='--input=.*link.jsonl is where'):
    outputs.check(str(tmp_path / 'o.jsonl'), True, str(link))
  assert source.read_text() == 'rows'


def test_rows_of_another_run_are_replaced_on_demand_only(
    tmp_path: pathlib.Path,
):
  path, partial = str(tmp_path / 'o.jsonl'), tmp_path / 'o.jsonl.partial'
  partial.write_text('rows')
  for refuse in (
      lambda: outputs.check(path, False),
      lambda: outputs.Output(path),
  ):
    with pytest.raises(FileExistsError, match='o.jsonl.partial is there: rows'):
      refuse()
  assert partial.read_text() == 'rows'
  outputs.check(path, overwrite=True)
  outputs.Output(path, overwrite=True).commit()
  assert pathlib.Path(path).read_text() == '' and not partial.exists()


_KILLED = """
import os, signal, sys
from ma_rlhf_jax.data import outputs

output = outputs.Output(sys.argv[1])
for i in (2, 0, 1):
  output.add(i, [{'row': i}])
output.flush()
os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
output.commit()
"""


def test_a_kill_while_rows_are_put_in_order_loses_none(
    tmp_path: pathlib.Path,
) -> None:
  path = tmp_path / 'o.jsonl'
  done = subprocess.run([sys.executable, '-c', _KILLED, str(path)])
  assert done.returncode == -9 and not path.exists()
  rows = _rows(tmp_path / 'o.jsonl.partial')
  assert [row['row'] for row in rows] == [2, 0, 1]
