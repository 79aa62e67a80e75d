"""Rows to examples, every way to give rows, and the authors' split."""

import gzip
import json
import pathlib

from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax.config import base
from ma_rlhf_jax.data import tasks
from ma_rlhf_jax.data.tasks import Example, load_examples, split_parts
from tests.oracle import cases, need

ROWS = [
    {'prompt': f'p{i}', 'chosen': f'c{i}', 'rejected': f'r{i}'}
    for i in range(8)
]
TALK = '\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Keeps the cache of `datasets` out of the home folder."""
  import datasets

  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


def _config(path: object = '', **fields: object) -> ConfigDict:
  config = base()
  config.data.task = 'columns'
  config.data.path = str(path)
  config.data.eval_rows = 2
  for name, value in fields.items():
    config.data[name] = value
  return config


def _write(path: pathlib.Path, rows: list) -> pathlib.Path:
  path.parent.mkdir(exist_ok=True)
  path.write_text('\n'.join(json.dumps(row) for row in rows))
  return path


def test_a_raw_hh_row_is_cut_after_the_last_assistant() -> None:
  row = {'chosen': TALK + ' Bye!', 'rejected': TALK + ' No.\n\nHuman: why'}
  expected = Example(TALK, ' Bye!', ' No.\n\nHuman: why')
  assert tasks.FORMATTERS['hh'](row) == expected


def test_a_full_hh_row_stays_as_it_is() -> None:
  row = {'prompt': TALK, 'chosen': ' a\n\nAssistant: b', 'rejected': ''}
  assert tasks.FORMATTERS['hh'](row) == (TALK, ' a\n\nAssistant: b', '')


@pytest.mark.parametrize(
    'chosen, rejected, reason',
    [
        (TALK + ' a', '\n\nHuman: Hi\n\nAssistant: b', 'prompts differ'),
        (TALK + ' a', 'b', 'no assistant turn'),
        ('a', TALK + ' b', 'no assistant turn'),
        (TALK + ' a', TALK + ' a', 'chosen equals rejected'),
    ],
)
def test_hh_rows_are_dropped_for_a_reason(
    chosen: str, rejected: str, reason: str
) -> None:
  row = {'chosen': chosen, 'rejected': rejected}
  assert tasks.format_row('hh', row) == reason


def test_an_empty_response_is_kept() -> None:
  row = {'prompt': 'p', 'chosen': '', 'rejected': ' '}
  assert tasks.format_row('columns', row) == ('p', '', ' ')


def test_oracle_hh_prompts() -> None:
  found = [c for c in cases('data_prompts.json') if c['dataset'] == 'hh']
  need(found, 'rows of HH')
  for case in found:
    names = ('get_prompt', 'get_chosen', 'get_rejected')
    want = tuple(case[name] for name in names)
    assert tasks.FORMATTERS['hh'](case['row']) == want, case['id']


def _sources(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The same rows in every form that is read."""
  import datasets

  table = datasets.Dataset.from_list(ROWS)
  datasets.disable_progress_bars()
  table.to_parquet(str(folder / 'a.parquet'))
  table.save_to_disk(str(folder / 'saved'))
  datasets.DatasetDict(train=table).save_to_disk(str(folder / 'dict'))
  jsonl = _write(folder / 'a.jsonl', ROWS)
  packed = [folder / 'a.jsonl.gz', folder / 'folder' / 'rows.jsonl.gz']
  for path in packed:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(jsonl.read_bytes()))
  return {
      'jsonl': jsonl,
      'json': _write(folder / 'a.json', [ROWS]),
      'jsonl.gz': packed[0],
      'folder': packed[1].parent,
      'parquet': folder / 'a.parquet',
      'saved': folder / 'saved',
      'saved splits': folder / 'dict',
  }


def test_every_local_form_gives_the_same_examples(
    tmp_path: pathlib.Path,
) -> None:
  expected = None
  for name, path in _sources(tmp_path).items():
    train, held_out, counts = load_examples(_config(path))
    expected = expected or (train, held_out)
    assert (train, held_out) == expected, name
    assert counts == {'training rows': 6, 'held-out rows': 2}
  every = sorted(expected[0] + expected[1])
  assert every == [tuple(row.values()) for row in ROWS]
  assert expected[0] == sorted(expected[0])  # the others keep their order


def test_columns_can_have_other_names(tmp_path: pathlib.Path) -> None:
  rows = [{'q': f'{i}', 'good': 'a', 'bad': 'b', 'extra': i} for i in range(4)]
  config = _config(
      _write(tmp_path / 'q.jsonl', rows),
      prompt_column='q',
      chosen_column='good',
      rejected_column='bad',
      eval_rows=1,
  )
  train, held_out, _ = load_examples(config)
  assert sorted(train + held_out) == [(f'{i}', 'a', 'b') for i in range(4)]


def test_dropped_rows_keep_their_place(tmp_path: pathlib.Path) -> None:
  rows = [dict(row) for row in ROWS]
  rows[2]['rejected'] = rows[2]['chosen']
  other = _write(tmp_path / 'eval.jsonl', [*rows[2:3], *ROWS])
  config = _config(
      _write(tmp_path / 'a.jsonl', rows), eval_path=str(other), eval_rows=3
  )
  train, held_out, counts = load_examples(config)
  assert [x and x.prompt for x in train] == [
      'p0', 'p1', None, 'p3', 'p4', 'p5', 'p6', 'p7'
  ]  # fmt: skip
  assert [x.prompt for x in held_out] == ['p0', 'p1']
  assert counts == {
      'training rows': 8,
      'held-out rows': 3,
      'chosen equals rejected': 2,
  }


def test_splits_of_a_folder_and_slices_of_a_file(
    tmp_path: pathlib.Path,
) -> None:
  _write(tmp_path / 'two' / 'train.jsonl', ROWS[:5])
  _write(tmp_path / 'two' / 'test.jsonl', ROWS[5:])
  config = _config(tmp_path / 'two', eval_split='test')
  train, held_out, _ = load_examples(config)
  assert [x.prompt for x in train] == ['p0', 'p1', 'p2', 'p3', 'p4']
  assert [x.prompt for x in held_out] == ['p5', 'p6']
  path = _write(tmp_path / 'a.jsonl', ROWS)
  config = _config(path, split='train[:6]', eval_split='train[6:]')
  train, held_out, _ = load_examples(config)
  assert (len(train), held_out[0].prompt) == (6, 'p6')


def test_max_rows_takes_the_first(tmp_path: pathlib.Path) -> None:
  config = _config(_write(tmp_path / 'a.jsonl', ROWS), max_rows=5)
  train, held_out, _ = load_examples(config)
  assert sorted(x.prompt for x in train + held_out) == [
      f'p{i}' for i in range(5)
  ]


def test_synthetic_evaluation_rows_follow_the_training_rows() -> None:
  config = base()
  config.data.synthetic_rows, config.data.eval_rows = 10, 4
  train, held_out, _ = load_examples(config)
  config.data.synthetic_rows = 14
  assert load_examples(config)[0] == train + held_out
  config.data.max_rows = 3
  assert load_examples(config)[0] == train[:3]


# Bad input: (rows or None for no file, fields, error, message)
BAD = {
    'none.jsonl': (None, {}, FileNotFoundError, 'no such file or folder'),
    'empty.jsonl': ([], {}, ValueError, 'holds no rows'),
    'null.jsonl': (
        [*ROWS, {'prompt': None, 'chosen': 'a', 'rejected': 'b'}],
        {},
        ValueError,
        "row 8 .from 0., column 'prompt' holds None",
    ),
    'number.jsonl': (
        [{'prompt': 'p', 'chosen': 3, 'rejected': 'b'}] * 3,
        {},
        ValueError,
        "row 0 .from 0., column 'chosen' holds 3",
    ),
    'column.jsonl': (
        ROWS,
        {'prompt_column': 'question'},
        ValueError,
        'no column question.*prompt, chosen, rejected',
    ),
    'few.jsonl': (ROWS[:3], {}, ValueError, '3 rows; at least 4 are needed'),
    'split.jsonl': (ROWS, {'split': 'test'}, ValueError, "'test'.*train"),
    'same.jsonl': (ROWS, {'eval_split': 'train'}, ValueError, 'eval_split'),
    'form.csv': (ROWS, {}, ValueError, 'must end in .jsonl'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_named(tmp_path: pathlib.Path, name: str) -> None:
  rows, fields, error, message = BAD[name]
  path = tmp_path / name
  if rows is not None:
    _write(path, rows)
  with pytest.raises(error, match=message) as caught:
    load_examples(_config(path, **fields))
  assert 'data.' in str(caught.value)


def test_broken_json_names_the_file_and_the_row(tmp_path: pathlib.Path) -> None:
  path = _write(tmp_path / 'broken.jsonl', ROWS)
  path.write_text(path.read_text() + '\n{broken')
  with pytest.raises(ValueError, match='data.path=.*broken.jsonl.*row 8'):
    load_examples(_config(path))


def test_no_path_is_named() -> None:
  with pytest.raises(ValueError, match="data.path=''.*set data.path"):
    load_examples(_config(''))


def test_an_empty_folder_is_named(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='data.path=.*empty'):
    load_examples(_config(tmp_path / 'empty'))


def test_reading_leaves_progress_bars_as_they_were(
    tmp_path: pathlib.Path,
) -> None:
  import datasets

  path = _write(tmp_path / 'a.jsonl', ROWS)
  datasets.enable_progress_bars()
  load_examples(_config(path))
  assert not datasets.are_progress_bars_disabled()
  datasets.disable_progress_bars()
  load_examples(_config(path))
  assert datasets.are_progress_bars_disabled()


def test_oracle_splits() -> None:
  for case in cases('data_splits.json'):
    shares = [float(share) for share in case['data_split'].split(',')]
    parts = split_parts(case['size'], shares, case['seed'])
    assert [part.tolist() for part in parts] == case['parts'], case['id']
    assert {part.dtype for part in parts} == {np.dtype(np.uint32)}


def test_surplus_goes_where_the_authors_put_it() -> None:
  # Seed 1234 leaves 3 rows in order; round(1.5) = 2, so the boundaries
  # 0 0 2 4 have a surplus of 1 and become 0 -1 1 3.
  parts = split_parts(3, (0, 1, 1), 1234)
  assert [part.tolist() for part in parts] == [[0, 1], [], [1, 2]]
  # round(2.5) = 2 twice: 0 2 4 lack 1 and become 0 3 5.
  assert [len(part) for part in split_parts(5, (1, 1), 7)] == [3, 2]


def test_parts_are_disjoint_and_whole() -> None:
  parts = split_parts(1000, (2, 4, 4), 5)
  assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
  assert [len(part) for part in parts] == [200, 400, 400]
