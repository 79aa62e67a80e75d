"""What is not as it was written is found, whatever bit has changed."""

import hashlib
import os
import pathlib

import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax.manifest import DamagedError

CONTENT = {'step': 4, 'rate': 1e-05, 'name': 'é', 'parts': [1, 2], 'x': None}


def _flip(path: pathlib.Path, bit: int) -> None:
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def _folder(folder: pathlib.Path) -> pathlib.Path:
  (folder / 'deep').mkdir(parents=True)
  (folder / 'model.safetensors').write_bytes(bytes(range(40)))
  (folder / 'deep' / 'config.json').write_text('{"a": 1}')
  manifest.write(folder)
  return folder


def test_sealed_content_comes_back(tmp_path: pathlib.Path) -> None:
  for content in (CONTENT, {}):
    (tmp_path / 'a').write_text(manifest.sealed(content))
    assert manifest.read_sealed(tmp_path / 'a') == content
  want = b'{"a":[1,2.5],"b":"x"}'
  content = {'a': [1, 2.5], 'b': 'x'}
  assert manifest.digest(content) == hashlib.sha256(want).hexdigest()


def test_no_flipped_bit_changes_what_a_sealed_file_says(
    tmp_path: pathlib.Path,
) -> None:
  path = tmp_path / 'done.json'
  whole = manifest.sealed(CONTENT)
  path.write_text(whole)
  found = 0
  for bit in range(0, 8 * len(whole.encode()), 7):  # every place in a byte
    _flip(path, bit)
    try:
      assert manifest.read_sealed(path) == CONTENT  # a blank beside a token
    except DamagedError as error:
      assert str(path) in str(error) and 'damaged' in str(error)
      found += 1
    _flip(path, bit)
  assert path.read_text() == whole and found > 8 * 120 / 7


def test_a_cut_file_is_damaged_and_one_without_digest_is_taken_as_it_is(
    tmp_path: pathlib.Path,
) -> None:
  path, whole = tmp_path / 'done.json', manifest.sealed(CONTENT)
  for cut in range(len(whole) - 1):  # the last character is the newline
    path.write_text(whole[:cut])
    with pytest.raises(DamagedError):
      manifest.read_sealed(path)
  path.write_text('[1]')
  with pytest.raises(DamagedError, match='no JSON object'):
    manifest.read_sealed(path)
  path.write_text('{"step": 4, "params_sha256": {"sft": "ab"}}')
  assert manifest.read_sealed(path) == {
      'step': 4,
      'params_sha256': {'sft': 'ab'},
  }
  with pytest.raises(FileNotFoundError):
    manifest.read_sealed(tmp_path / 'none')


def test_the_manifest_names_every_file_with_its_sha256(
    tmp_path: pathlib.Path,
) -> None:
  folder = _folder(tmp_path / 'a')
  assert manifest.read(folder) == {
      'deep/config.json': {
          'bytes': 8,
          'sha256': hashlib.sha256(b'{"a": 1}').hexdigest(),
      },
      'model.safetensors': {
          'bytes': 40,
          'sha256': hashlib.sha256(bytes(range(40))).hexdigest(),
      },
  }
  assert manifest.verify(folder)
  digest = manifest.digest_of(folder)
  (folder / 'deep' / 'config.json').write_text('{"a": 2}')
  assert manifest.write(folder) == manifest.digest_of(folder) != digest
  assert not manifest.verify(tmp_path)
  assert manifest.digest_of(tmp_path) is None


@pytest.mark.parametrize('name', ['model.safetensors', 'deep/config.json'])
def test_a_flipped_bit_of_a_file_is_found(
    tmp_path: pathlib.Path, name: str
) -> None:
  folder = _folder(tmp_path / 'a')
  for bit in range(0, 8 * (folder / name).stat().st_size, 5):
    _flip(folder / name, bit)
    with pytest.raises(DamagedError, match=name):
      manifest.verify(folder)
    _flip(folder / name, bit)
  assert manifest.verify(folder)
  assert manifest.verify(folder, lambda n: n != name)


def test_no_flipped_bit_of_a_manifest_lets_damage_pass(
    tmp_path: pathlib.Path,
) -> None:
  folder = _folder(tmp_path / 'a')
  path, want = folder / manifest.NAME, manifest.read(folder)
  for bit in range(0, 8 * path.stat().st_size, 23):
    _flip(path, bit)
    try:
      assert manifest.read(folder) == want
    except DamagedError as error:
      assert manifest.NAME in str(error)
    _flip(path, bit)


def test_missing_and_cut_files_are_named_with_the_fix(
    tmp_path: pathlib.Path,
) -> None:
  folder = _folder(tmp_path / 'run' / 'sft' / 'hf')
  path = folder / 'model.safetensors'
  path.write_bytes(bytes(range(39)))
  with pytest.raises(DamagedError) as caught:
    manifest.verify(folder)
  assert f'{path} is damaged: it has 39 bytes' in str(caught.value)
  assert f'remove {manifest.NAME}' in str(caught.value)
  path.unlink()
  (folder.parent / 'done.json').write_text('{}')  # the product of a run
  with pytest.raises(DamagedError) as caught:
    manifest.verify(folder)
  assert 'it is missing' in str(caught.value)
  assert f'run the train command of {tmp_path / "run"}' in str(caught.value)
  with pytest.raises(DamagedError, match='; so it is$'):
    manifest.verify(folder, remedy='so it is')


def test_damage_is_told_in_place_of_what_it_broke(
    tmp_path: pathlib.Path,
) -> None:
  folder = _folder(tmp_path / 'a')
  with pytest.raises(OSError, match='mine'), manifest.verifying(folder):
    raise OSError('mine')
  _flip(folder / 'model.safetensors', 99)
  with pytest.raises(DamagedError), manifest.verifying(folder):
    raise OSError('what the flipped bit broke')
  with pytest.raises(DamagedError), manifest.verifying(folder):
    pass


def test_an_old_file_is_read_once_and_again_when_it_changes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path = tmp_path / 'a'
  read, hashed = [], manifest._hashed
  monkeypatch.setattr(
      manifest, '_hashed', lambda p: (read.append(p), hashed(p))[1]
  )
  path.write_bytes(b'one')
  for _ in range(2):  # it may change without a later time stamp
    assert manifest.sha256(path) == hashlib.sha256(b'one').hexdigest()
  assert len(read) == 2
  os.utime(path, (1e9, 1e9))
  for _ in range(3):
    assert manifest.sha256(path) == hashlib.sha256(b'one').hexdigest()
  assert len(read) == 3
  path.write_bytes(b'two')
  os.utime(path, (1e9 + 1, 1e9 + 1))
  assert manifest.sha256(path) == hashlib.sha256(b'two').hexdigest()


def test_a_seal_that_lost_a_digit_is_damage(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'done.json'
  text = manifest.sealed({'step': 6}).replace('"step": 6', '"step": 9')
  path.write_text(text[:-5] + text[-4:])
  with pytest.raises(manifest.DamagedError, match='done.json'):
    manifest.read_sealed(path)
