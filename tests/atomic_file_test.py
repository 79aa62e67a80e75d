"""A file is whole or as it was, at whatever moment its writer is killed."""

import pathlib
import re
import subprocess
import sys

import pytest

from ma_rlhf_jax import atomic_file

_KILLED = """
import os, signal, sys
from ma_rlhf_jax import atomic_file

with atomic_file.opened(sys.argv[1]) as file:
  file.write(b'{"half": ')
  file.flush()
  os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize('before', [None, '{"old": 1}'])
def test_a_kill_in_the_middle_leaves_what_was_there(
    tmp_path: pathlib.Path, before: str | None
) -> None:
  path = tmp_path / 'done.json'
  if before:
    path.write_text(before)
  done = subprocess.run([sys.executable, '-c', _KILLED, str(path)])
  assert done.returncode == -9
  assert (path.read_text() if path.exists() else None) == before
  assert (tmp_path / '.done.json.part').read_text() == '{"half": '
  atomic_file.write_json(path, {'new': [2]})
  assert [p.name for p in tmp_path.iterdir()] == ['done.json']
  assert path.read_text() == '{\n  "new": [\n    2\n  ]\n}\n'


def test_an_error_in_the_middle_leaves_what_was_there(
    tmp_path: pathlib.Path,
) -> None:
  path = tmp_path / 'x'
  path.write_text('old')
  with pytest.raises(OSError, match='full'), atomic_file.opened(path) as file:
    file.write(b'new')
    raise OSError('full')
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_a_value_that_json_does_not_know_writes_nothing(
    tmp_path: pathlib.Path,
) -> None:
  with pytest.raises(ValueError, match='not JSON compliant'):
    atomic_file.write_json(tmp_path / 'x', {'loss': float('nan')})
  assert not list(tmp_path.iterdir())


def test_a_link_is_followed_and_a_device_written_to(
    tmp_path: pathlib.Path,
) -> None:
  (tmp_path / 'real').write_text('old')
  (tmp_path / 'link').symlink_to(tmp_path / 'real')
  atomic_file.write_text(tmp_path / 'link', 'né')
  assert (tmp_path / 'link').is_symlink()
  assert (tmp_path / 'real').read_bytes() == b'n\xc3\xa9'
  atomic_file.write_text('/dev/null', 'x')


def test_what_kills_left_is_removed(tmp_path: pathlib.Path) -> None:
  for name in ('.a.jsonl.part', 'a.jsonl', 'b.part', '.c'):
    (tmp_path / name).write_text('')
  atomic_file.remove_parts(tmp_path)
  left = {p.name for p in tmp_path.iterdir()}
  assert left == {'a.jsonl', 'b.part', '.c'}


# A file that is written in its place, and why a kill does no harm there.
_IN_PLACE = {
    'data/outputs.py': 'rows as they come, named .partial until they are whole',
    'models/exporting.py': 'the draft of a folder',
    'models/folders.py': 'a lock, which is empty',
    'models/peft_folder.py': 'the draft of a folder',
    'parallel/cluster.py': '/dev/null',
    'planning/compiling.py': 'a temporary folder of this process',
    'publishing/publish.py': 'the draft of a folder',
    'workdir_lock.py': 'a lock, which is empty',
}
_WRITES = re.compile(
    r"""\.write_(?:text|bytes)\(|open\([^)]*['"][wxa]b?['"]|mode = '[wxa]'"""
)


def test_nothing_else_writes_a_file_in_its_place() -> None:
  package = pathlib.Path(atomic_file.__file__).parent
  found = set()
  for path in package.rglob('*.py'):
    text = path.read_text().replace('atomic_file.write_', 'atomic_file.')
    if path.name != 'atomic_file.py' and _WRITES.search(text):
      found.add(str(path.relative_to(package)))
  assert found == set(_IN_PLACE)
