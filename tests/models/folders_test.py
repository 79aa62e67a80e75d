"""Folders appear whole or not at all."""

import errno
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import safetensors

from ma_rlhf_jax.models import folders
from ma_rlhf_jax.models.folders import NoSpaceError, whole


def _names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_filled(tmp_path: pathlib.Path) -> None:
  target = tmp_path / 'deep' / 'out'
  with whole(target, marker='m') as draft:
    (draft / 'm').write_text('1')
    assert not target.exists()
    assert draft.parent.parent == target.parent  # so that a rename suffices
  assert _names(target) == ['m'] and _names(target.parent) == ['out']


@pytest.mark.parametrize('there', [True, False])
def test_a_failure_leaves_what_was_there_and_no_more(
    tmp_path: pathlib.Path, there: bool
) -> None:
  target = tmp_path / 'out'
  if there:
    target.mkdir()
    (target / 'old').write_text('')
  with pytest.raises(KeyError, match='half'):
    with whole(target, marker='m', overwrite=True) as draft:
      (draft / 'm').write_text('')
      raise KeyError('half')
  assert _names(tmp_path) == (['out'] if there else [])
  assert not there or _names(target) == ['old']


def test_what_is_there_is_replaced_only_on_request(
    tmp_path: pathlib.Path,
) -> None:
  target = tmp_path / 'out'
  target.mkdir()
  with whole(target, marker='m') as draft:  # an empty one is in nobody's way
    (draft / 'old').write_text('')
  with pytest.raises(FileExistsError, match='out is there and not empty'):
    with whole(target, marker='m'):
      pytest.fail('entered')
  with whole(target, marker='m', overwrite=True) as draft:
    (draft / 'new').write_text('')
  assert _names(target) == ['new'] and _names(tmp_path) == ['out']
  with pytest.raises(FileExistsError, match='new is a file'):
    with whole(target / 'new', marker='m', overwrite=True):
      pytest.fail('entered')


def _full() -> None:
  raise OSError(errno.ENOSPC, 'No space left on device')


def _over_quota() -> None:
  raise OSError(errno.EDQUOT, 'Disk quota exceeded')


def _full_in_rust() -> None:
  # As safetensors 0.8 says it on a full tmpfs.
  raise safetensors.SafetensorError(
      'I/O error: No space left on device (os error 28)'
  )


def _too_large_in_rust() -> None:
  raise safetensors.SafetensorError('I/O error: File too large (os error 27)')


def _over_quota_in_rust() -> None:
  raise safetensors.SafetensorError(
      'I/O error: Disk quota exceeded (os error 122)'
  )


@pytest.mark.parametrize(
    ('fail', 'reason'),
    [
        (_full, 'no space left on device'),
        (_over_quota, 'disk quota exceeded'),
        (_full_in_rust, 'no space left on device'),
        (_too_large_in_rust, 'file too large'),
        (_over_quota_in_rust, 'disk quota exceeded'),
    ],
)
def test_a_full_disk_gives_one_message_and_leaves_nothing(
    tmp_path: pathlib.Path, fail: Any, reason: str
) -> None:
  target = tmp_path / 'out'
  with pytest.raises(NoSpaceError) as caught:
    with whole(target, marker='m') as outer:
      with whole(outer / 'inner', marker='m') as draft:
        (draft / 'half').write_text('')
        fail()
  message = str(caught.value)
  assert message.startswith(f'{target}: {reason}, on the disk of {tmp_path}')
  assert 'removed' in message and '\n' not in message
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    'error', [PermissionError(13, 'no'), safetensors.SafetensorError('header')]
)
def test_other_errors_stay_as_they_are(
    tmp_path: pathlib.Path, error: Exception
) -> None:
  with pytest.raises(type(error)) as caught:
    with whole(tmp_path / 'out', marker='m'):
      raise error
  assert caught.value is error


def test_a_rename_that_fails_puts_back_what_was_there(
    tmp_path: pathlib.Path,
) -> None:
  target = tmp_path / 'out'
  target.mkdir()
  (target / 'old').write_text('')
  with pytest.raises(FileNotFoundError):
    with whole(target, marker='m', overwrite=True) as draft:
      draft.rmdir()
  assert _names(target) == ['old'] and _names(tmp_path) == ['out']


def test_the_marker_comes_last_where_rename_is_not_atomic(
    tmp_path: pathlib.Path,
) -> None:
  order, target, draft = [], tmp_path / 'bucket', tmp_path / 'draft'
  for folder, names in ((target, 'ax'), (draft, 'mab')):
    folder.mkdir()
    for name in names:
      (folder / name).write_text(folder.name)
  (target / 'm').write_text('bucket')

  class Recording(type(folders.epath.Path(target))):

    def unlink(self, *args: Any) -> None:
      order.append(f'-{self.name}')
      super().unlink(*args)

    def __truediv__(self, name: str) -> Any:
      order.append(f'+{name}')
      return super().__truediv__(name)

  folders._upload(draft, Recording(target), 'm')
  assert order[0] == '-m' and order[-1] == '+m'
  assert sorted(order) == ['+a', '+b', '+m', '-a', '-m', '-x']
  assert {p.name: p.read_text() for p in target.iterdir()} == {
      name: 'draft' for name in 'abm'
  }


_FILL = """
import os, pathlib, signal, sys
from ma_rlhf_jax.models import folders
if sys.argv[2] == 'between':
  folders._exchange = lambda *_: False
with folders.whole(sys.argv[1], marker='m', overwrite=True) as draft:
  (draft / 'm').write_text('new')
  if sys.argv[2] == 'between':
    path = type(folders.epath.Path(sys.argv[1]))
    moved = path.rename
    def killed(self, other):
      moved(self, other)
      os.kill(os.getpid(), signal.SIGKILL)
    path.rename = killed
  else:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize('when', ['filling', 'between'])
def test_what_a_kill_leaves_is_removed_and_what_it_moved_comes_back(
    tmp_path: pathlib.Path, when: str
) -> None:
  target = tmp_path / 'out'
  target.mkdir()
  (target / 'm').write_text('old')
  command = [sys.executable, '-c', _FILL, str(target), when]
  assert subprocess.run(command, timeout=120).returncode == -9
  assert ('out' in _names(tmp_path)) == (when == 'filling')
  with pytest.raises(FileExistsError):
    with whole(target, marker='m'):
      pytest.fail('entered')
  assert _names(tmp_path) == ['out']
  assert (target / 'm').read_text() == 'old'


def test_a_scratch_folder_in_use_and_those_of_others_stay(
    tmp_path: pathlib.Path,
) -> None:
  (tmp_path / '.out-abcdefgh').mkdir()  # without a lock: not ours
  with whole(tmp_path / 'out', marker='m') as draft:
    (draft / 'm').write_text('1')
    with whole(tmp_path / 'out', marker='m') as other:
      (other / 'm').write_text('2')
      assert (draft / 'm').read_text() == '1'
      assert len(_names(tmp_path)) == 3
      (other / 'm').unlink()
  assert _names(tmp_path) == ['.out-abcdefgh', 'out']


def test_all_files_follow_the_umask(tmp_path: pathlib.Path) -> None:
  with whole(tmp_path / 'out', marker='m') as draft:
    for name, mode in (('m', 0o600), ('n', 0o640)):
      (draft / name).write_text('')
      (draft / name).chmod(mode)
  (tmp_path / 'plain').write_text('')
  want = (tmp_path / 'plain').stat().st_mode
  assert {p.stat().st_mode for p in (tmp_path / 'out').iterdir()} == {want}
