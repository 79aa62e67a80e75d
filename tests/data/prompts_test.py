"""Prompts from files: what is read, and what is said of what cannot be."""

import gzip
import json
import pathlib

import pytest

from ma_rlhf_jax.data import prompts


def _write(folder: pathlib.Path, *lines: str) -> str:
  path = folder / 'rows.jsonl'
  path.write_bytes(''.join(line + '\n' for line in lines).encode())
  return str(path)


def test_rows_come_with_their_fields_and_line_numbers(tmp_path: pathlib.Path):
  path = _write(tmp_path, '{"prompt": "a", "id": [1]}', ' ', '{"prompt": ""}')
  rows, numbers = prompts.read_rows(path)
  assert rows == [{'prompt': 'a', 'id': [1]}, {'prompt': ''}]
  assert numbers == [1, 3]


def test_gzip_is_read(tmp_path: pathlib.Path):
  path = tmp_path / 'rows.jsonl.gz'
  with gzip.open(path, 'wt', encoding='utf-8') as file:
    file.write(json.dumps({'prompt': 'é😀'}, ensure_ascii=False))
  assert prompts.read_rows(str(path))[0] == [{'prompt': 'é😀'}]
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ValueError, match='rows.jsonl.gz is no whole gzip file'):
    prompts.read_rows(str(path))


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('{"prompt": "a"', "no JSON: Expecting ',' delimiter at character 15"),
        ('["a"]', 'no JSON object; write {"prompt": "..."}'),
        ('{"text": "a"}', "has no field 'prompt'; it has 'text'"),
        ('{}', "has no field 'prompt'; it has nothing"),
        ('{"prompt": 3}', "'prompt' is 3, not text"),
        ('{"prompt": null}', "'prompt' is null, not text"),
        (
            '{"prompt": "a", "x": NaN}',
            'holds NaN, which no JSON number can be',
        ),
        (
            '{"prompt": "a", "x": 1e999}',
            'holds 1e999, beyond the largest float',
        ),
        ('{"prompt": "a", "x": ' + '9' * 5000 + '}', 'of too many digits'),
        ('[' * 10**5, 'is nested too deeply'),
        (r'{"prompt": "a\ud83d"}', "'prompt' holds half a character (U+D83D)"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: pathlib.Path, line: str, words: str
):
  path = _write(tmp_path, '{"prompt": "fine"}', '', line)
  with pytest.raises(ValueError) as error:
    prompts.read_rows(path)
  told = str(error.value)
  assert told.startswith(f'--input={path}: line 3 ') and told.endswith(words)


def test_bytes_that_are_no_text_are_named(tmp_path: pathlib.Path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'{"prompt": "caf\xe9"}\n')
  with pytest.raises(ValueError, match='line 1 is no UTF-8: invalid'):
    prompts.read_rows(str(path))


def test_marks_of_other_systems_do_no_harm(tmp_path: pathlib.Path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
  rows, numbers = prompts.read_rows(str(path))
  assert rows == [{'prompt': 'a'}, {'prompt': 'b'}] and numbers == [1, 2]


def test_of_many_bad_rows_the_first_are_listed(tmp_path: pathlib.Path):
  path = _write(tmp_path, *['[]'] * 8)
  with pytest.raises(ValueError) as error:
    prompts.read_rows(path)
  lines = str(error.value).splitlines()
  assert [line.split(' is ')[0].strip() for line in lines[1:-1]] == [
      f'line {number}' for number in range(1, 6)
  ]
  assert lines[-1] == '  and 3 more'


def test_files_without_rows_and_absent_ones_are_refused(tmp_path: pathlib.Path):
  with pytest.raises(ValueError, match='holds no row'):
    prompts.read_rows(_write(tmp_path, '', ''))
  with pytest.raises(OSError, match='--input=none.jsonl cannot be read: No '):
    prompts.read_rows('none.jsonl')


def test_bos_comes_first_and_special_tokens_are_text(tokenizer: object):
  plain, empty, special = prompts.encode(tokenizer, ['the boat', '', '<eos>'])
  assert plain[0] == 2 and len(plain) > 1
  assert empty == [2]
  assert special[0] == 2 and not {0, 1, 2} & set(special[1:])
  assert tokenizer.decode(special[1:]) == '<eos>'


def test_every_prompt_that_is_too_long_is_told():
  names = ['line 1', 'line 4', 'line 9']
  prompts.check_lengths('--input=x', names, [7, 6, 2], 7)
  with pytest.raises(ValueError) as error:
    prompts.check_lengths('--input=x', names, [7, 6, 2], 6)
  assert str(error.value) == (
      '--input=x: line 1 has 7 tokens (BOS included), more than '
      '--max_prompt_len=6; shorten it, or raise --max_prompt_len (or lower '
      '--max_new_tokens)'
  )
  with pytest.raises(ValueError) as error:
    prompts.check_lengths('--input=x', names, [7, 6, 2], 5)
  assert str(error.value).splitlines()[0] == '--input=x:'
  assert 'line 4 has 6 tokens' in str(error.value)
  assert 'line 9' not in str(error.value)
