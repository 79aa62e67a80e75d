"""Rows of a data set -> examples, and the split over the three stages.

A row is read as a dict with the keys that its task needs, then a formatter
(`FORMATTERS`) turns it into an `Example` or gives the reason to drop it.
"""

from collections.abc import Callable, Sequence
import pathlib
from typing import TYPE_CHECKING, NamedTuple

from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax.data import synthetic

if TYPE_CHECKING:
  import datasets

Row = dict[str, str]
_ASSISTANT = '\n\nAssistant:'
# What a local file's name may end in, and the reader of `datasets` for it.
_READERS = {
    '.jsonl': 'json',
    '.json': 'json',
    '.jsonl.gz': 'json',
    '.json.gz': 'json',
    '.parquet': 'parquet',
}


class Example(NamedTuple):
  """A prompt and two responses, the first of which was preferred."""

  prompt: str
  chosen: str
  rejected: str


def plain_row(row: Row) -> Example | str:
  """The row as it stands: `prompt`, `chosen` and `rejected`, nothing added.

  For `Dahoas/full-hh-rlhf` this is what the authors' get_prompt, get_chosen and
  get_rejected give.
  """
  return Example(row['prompt'], row['chosen'], row['rejected'])


def hh_row(row: Row) -> Example | str:
  """Either public form of HH; raw rows are cut after the last 'Assistant:'.

  A raw row has no `prompt`; `chosen` and `rejected` are whole dialogues
  `\\n\\nHuman: ...\\n\\nAssistant: ...` that share all but the last reply.
  """
  if 'prompt' in row:
    return plain_row(row)
  prompt, mark, chosen = row['chosen'].rpartition(_ASSISTANT)
  other, other_mark, rejected = row['rejected'].rpartition(_ASSISTANT)
  if not mark or not other_mark:
    return 'no assistant turn'
  if prompt != other:
    return 'prompts differ'
  return Example(prompt + mark, chosen, rejected)


# Task -> pure function of a row: an example, or the reason it is dropped.
FORMATTERS: dict[str, Callable[[Row], Example | str]] = {
    'synthetic': plain_row,
    'hh': hh_row,
    'columns': plain_row,
}


def _fields(config: ConfigDict, names: Sequence[str]) -> dict[str, str]:
  """Key of a row -> column that holds it; `names` are the columns there."""
  if config.data.task == 'columns':
    return {
        'prompt': config.data.prompt_column,
        'chosen': config.data.chosen_column,
        'rejected': config.data.rejected_column,
    }
  keys = ['prompt'] if 'prompt' in names else []
  return {key: key for key in [*keys, 'chosen', 'rejected']}


def _reader(path: str) -> str | None:
  """Name of the reader for a file; None where the ending is not known."""
  name = path.lower()
  return next((r for end, r in _READERS.items() if name.endswith(end)), None)


def _check_path(field: str, path: str) -> None:
  """Raises where `path` cannot be a file, a folder or a hub name."""
  local = pathlib.Path(path)
  if not path:
    raise ValueError(
        f"{field}='' but data.task reads rows; set {field} to a file, a "
        'folder or a hub name'
    )
  looks_local = _reader(path) or path.startswith(('.', '/', '~'))
  if '://' not in path and not local.exists() and looks_local:
    raise FileNotFoundError(
        f'{field}={path!r}: there is no such file or folder (seen from '
        f'{pathlib.Path.cwd()}); give an existing one, or a hub name like '
        'Dahoas/full-hh-rlhf'
    )
  if ('://' in path or local.is_file()) and not _reader(path):
    raise ValueError(
        f'{field}={path!r}: the file must end in {", ".join(_READERS)}'
    )


def _open(path: str, subset: str, split: str) -> 'datasets.Dataset':
  """The data set behind `path`; a single file has the split 'train' only."""
  import datasets

  local = pathlib.Path(path)
  if '://' in path or local.is_file():
    files = {'train': path}
    return datasets.load_dataset(_reader(path), data_files=files, split=split)
  if (local / 'state.json').is_file():
    return datasets.load_from_disk(path)
  if (local / 'dataset_dict.json').is_file():
    splits = datasets.load_from_disk(path)
    if split not in splits:
      raise ValueError(f'there is no such split; it has {", ".join(splits)}')
    return splits[split]
  return datasets.load_dataset(path, name=subset or None, split=split)


def _open_quietly(
    field: str, path: str, subset: str, split: str
) -> 'datasets.Dataset':
  """`_open` without progress bars, with errors that say what to change."""
  import datasets

  _check_path(field, path)
  where = f'{field}={path!r}, split {split!r}, subset {subset!r}'
  shown = not datasets.are_progress_bars_disabled()
  datasets.disable_progress_bars()
  try:
    return _open(path, subset, split)
  except StopIteration:  # how `datasets` reports an empty file
    raise ValueError(f'{where} holds no rows') from None
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{where} holds no data: {error}') from error
  except ConnectionError as error:
    raise ConnectionError(
        f'{where}: {error}; for a local file or folder give its whole path'
    ) from error
  except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
    cause = error.__cause__ or error
    raise ValueError(f'{where} cannot be read: {cause}') from error
  finally:
    if shown:
      datasets.enable_progress_bars()


def _read(
    config: ConfigDict, field: str, path: str, split: str, limit: int
) -> list[Row]:
  """The first `limit` rows (0 = all) with the columns that the task needs."""
  table = _open_quietly(field, path, config.data.subset, split)
  if limit:
    table = table.select(range(min(limit, len(table))))
  if not len(table):
    raise ValueError(f'{field}={path!r}, split {split!r} holds no rows')
  fields = _fields(config, table.column_names)
  missing = [
      column for column in fields.values() if column not in table.column_names
  ]
  if missing:
    raise ValueError(
        f'{field}={path!r} has no column {", ".join(missing)} for '
        f'data.task={config.data.task!r}; it has '
        f'{", ".join(table.column_names)}; with data.task=columns set '
        'data.prompt_column, data.chosen_column and data.rejected_column'
    )
  columns = {key: table[column][:] for key, column in fields.items()}
  for key, cells in columns.items():
    for index, cell in enumerate(cells):
      if not isinstance(cell, str):
        raise ValueError(
            f'{field}={path!r}, row {index} (from 0), column '
            f'{fields[key]!r} holds {cell!r}; it must be text; mend or '
            'remove the row'
        )
  return [
      dict(zip(columns, cells, strict=True))
      for cells in zip(*columns.values(), strict=True)
  ]


def check_task(task: str) -> None:
  """Raises ValueError if the rows of a task cannot be read."""
  if task not in FORMATTERS:
    raise ValueError(
        f'data.task={task!r}: its rows cannot be read yet, only '
        f'{", ".join(FORMATTERS)}; for the same recipe on rows with prompt, '
        'chosen and rejected give --config.data.task=columns and '
        '--config.data.path'
    )


def _synthetic_rows(config: ConfigDict) -> tuple[list[Row], list[Row]]:
  """Rows to train on, and the ones that follow in the same stream."""
  c = config.data
  options = {'seed': c.split_seed, 'label_noise': c.label_noise}
  size = min(c.max_rows or c.synthetic_rows, c.synthetic_rows)
  return (
      synthetic.make_rows(size, **options),
      synthetic.make_rows(c.eval_rows, start=c.synthetic_rows, **options),
  )


def _hold_out(
    config: ConfigDict, rows: list[Row]
) -> tuple[list[Row], list[Row]]:
  """The rows in their order without the held-out ones, and those.

  At most a quarter of the rows is held out.
  """
  count = min(config.data.eval_rows, len(rows) // 4)
  if not count:
    raise ValueError(
        f'data.path={config.data.path!r} has {len(rows)} rows; at least 4 are '
        'needed, of which a quarter is held out, or data.eval_path'
    )
  rng = np.random.default_rng(config.data.split_seed)
  keep, held_out = np.split(rng.permutation(len(rows)), [len(rows) - count])
  return [rows[i] for i in np.sort(keep)], [rows[i] for i in held_out]


def _stored_rows(config: ConfigDict) -> tuple[list[Row], list[Row]]:
  """Rows of `data.path`, and those to evaluate on."""
  c = config.data
  rows = _read(config, 'data.path', c.path, c.split, c.max_rows)
  if not c.eval_path and not c.eval_split:
    return _hold_out(config, rows)
  if not c.eval_path and c.eval_split == c.split:
    raise ValueError(
        f'data.eval_split={c.eval_split!r} is data.split; evaluation needs '
        'other rows: give another split, or neither for held-out rows'
    )
  field = 'data.eval_path' if c.eval_path else 'data.path'
  split = c.eval_split or c.split.partition('[')[0]
  return rows, _read(config, field, c.eval_path or c.path, split, c.eval_rows)


def format_row(task: str, row: Row) -> Example | str:
  """The example of a row, or the reason it is dropped."""
  example = FORMATTERS[task](row)
  if isinstance(example, Example) and example.chosen == example.rejected:
    return 'chosen equals rejected'
  return example


def load_examples(
    config: ConfigDict,
) -> tuple[list[Example | None], list[Example], dict[str, int]]:
  """Examples to train on, held-out examples, and counts.

  The synthetic task holds out the rows that follow the training rows. Other
  tasks evaluate on the first `data.eval_rows` rows of `data.eval_path` and
  `data.eval_split`; where neither is set, the last `data.eval_rows` rows after
  a shuffle seeded with `data.split_seed` are held out, and the others keep
  their order.

  Args:
    config: see `config.base`; `data.*` is read.

  Returns:
    The training examples, None where a row was dropped, so that `split_parts`
    sees raw rows as the authors' split does; the held-out examples; and how
    many rows were read and dropped, by reason.

  Raises:
    FileNotFoundError: where there is no such data.
    ValueError: on data that is empty, too small, or lacks a column or a cell.
  """
  check_task(config.data.task)
  synthetic_task = config.data.task == 'synthetic'
  train, held_out = (
      _synthetic_rows(config) if synthetic_task else _stored_rows(config)
  )
  formatted = [format_row(config.data.task, row) for row in train + held_out]
  counts = {'training rows': len(train), 'held-out rows': len(held_out)}
  for reason in filter(lambda x: isinstance(x, str), formatted):
    counts[reason] = counts.get(reason, 0) + 1
  examples = [x if isinstance(x, Example) else None for x in formatted]
  held_out_examples = [x for x in examples[len(train) :] if x is not None]
  return examples[: len(train)], held_out_examples, counts


def split_parts(
    size: int, parts: Sequence[float], seed: int
) -> list[np.ndarray]:
  """Row indices of each part, as the authors' code deals them out.

  The shuffled indices are cut at the running sum of
  `round(size * part / sum(parts))`, halves to even. Where that gives more or
  fewer rows than there are, the surplus is taken from every boundary but the
  first: 1:1 of 5 gives 3 and 2. As in their code a boundary can so become
  negative, counted from the end: 0:1:1 of 3 gives 0, 1 | nothing | 1, 2.

  Args:
    size: rows to split.
    parts: relative sizes, >= 0.
    seed: of the shuffle.

  Returns:
    uint32 indices, one array a part.

  Source: get_shuffle_idx and get_raw_dataset_split_index of
  ernie-research/MA-RLHF.
  """
  order = np.arange(size, dtype=np.uint32)
  np.random.RandomState(seed).shuffle(order)
  total = sum(parts)
  bounds = [0]
  for part in parts:
    bounds.append(bounds[-1] + round(size * (part / total)))
  surplus = bounds[-1] - size
  bounds[1:] = [bound - surplus for bound in bounds[1:]]
  return [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


# The true quality of (prompt, response), for tasks that know it.
GOLD: dict[str, Callable[[str, str], float]] = {
    'synthetic': synthetic.gold_score,
}
