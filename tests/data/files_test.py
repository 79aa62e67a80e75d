"""Tests of `data.files`."""

import pathlib

import pytest

from ma_rlhf_jax.data import files

LFS = (
    b'version https://git-lfs.github.com/spec/v1\n'
    b'oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e\n'
    b'size 4945242264\n'
)
PAGE = b'\n<!DOCTYPE html><html><body>404 Not Found</body></html>'
# The first bytes of what torch.save and pickle.dump write.
ARCHIVE, PICKLE = b'PK\x03\x04\x00\x00\x08', b'\x80\x02}q\x00X\x05\x00\x00'


@pytest.mark.parametrize(
    ('content', 'what'),
    [
        (LFS, 'is a pointer of git lfs, not the file itself; run `git lfs'),
        (PAGE, 'is a web page (perhaps that of an error)'),
        (ARCHIVE, 'is a zip archive, as PyTorch writes pickles'),
        (PICKLE, 'is a pickle, which runs the code in it'),
        (b'{"a": 1}', ''),
        (b'', ''),
        # Headers of 60, 128 and 13 bytes: '<', 0x80 and a new line.
        (b'<\0\0\0\0\0\0\0{"x"', ''),
        (b'\x80\0\0\0\0\0\0\0{"x"', ''),
        (b'\n\0\0\0\0\0\0\0{"x"', ''),
    ],
)
def test_what_stands_in_for_a_file(
    content: bytes, what: str, tmp_path: pathlib.Path
) -> None:
  path = tmp_path / 'file'
  path.write_bytes(content)
  found = files.foreign(path)
  assert found.startswith(what) and bool(found) == bool(what)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (LFS, 'x.json is a pointer of git lfs'),
        (PAGE, 'x.json is a web page'),
        (b'{"a": ', 'x.json is no JSON .*download it again'),
        (b'', 'x.json is no JSON'),
        (b'{"a": "\xff"}', 'x.json is no JSON .*utf-8'),
        (b'{"a": ' + b'9' * 5000 + b'}', 'x.json is no JSON'),
        (b'[' * 100_000, 'x.json is no JSON'),
        (b'[{"a": 1}]', 'x.json holds a list; it must hold a JSON object'),
        (b'7', 'x.json holds a int'),
    ],
)
def test_no_json_object_is_said_clearly(
    content: bytes, message: str, tmp_path: pathlib.Path
) -> None:
  (tmp_path / 'x.json').write_bytes(content)
  with pytest.raises(ValueError, match=message):
    files.read_json(tmp_path / 'x.json')


def test_json_is_read(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'x.json').write_text(' {"a": [1, "ä"]}\n', 'utf-8')
  assert files.read_json(tmp_path / 'x.json') == {'a': [1, 'ä']}


def test_no_huge_file_is_parsed(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'x.json'
  with path.open('wb') as file:
    file.write(b'{')
    file.truncate(10**12)  # a hole: it takes no space
  with pytest.raises(ValueError, match='has 1000000000000 bytes; such a file'):
    files.read_json(path)
