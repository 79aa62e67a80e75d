"""Metric lines, their sinks and how they are read; the finite check.

Metric files are never appended to nor renamed, so that they may lie in a
bucket. Each start of a run writes its own parts, and a part is rewritten whole
until it is sealed, just before a checkpoint:

  <folder>/metrics/0001-0001.jsonl   start 1, up to its first checkpoint
  <folder>/metrics/0001-0002.jsonl   start 1, after it; then it was killed
  <folder>/metrics/0002-0001.jsonl   start 2, resumed from that checkpoint

A kill can thus lose only lines after the last checkpoint, which the next start
writes again, bit for bit except for the fields under `time/` and `host/`.
"""

from collections.abc import Mapping, Sequence
import importlib.util
import json
import math
import time
from typing import Any, NamedTuple

from etils import epath

from ma_rlhf_jax import atomic_file
from ma_rlhf_jax.training import wandb_login


class NonFiniteError(FloatingPointError):
  """A metric is nan or infinite; `stage`, `step` and `names` say which.

  `what` says it in words, without what follows from it.
  """

  def __init__(
      self, stage: str, step: int, metrics: dict[str, float], checkpoint: str
  ) -> None:
    self.stage, self.step, self.names = stage, step, sorted(metrics)
    values = ', '.join(f'{name} = {metrics[name]}' for name in self.names)
    self.what = f'{stage} step {step}: {values}'
    super().__init__(
        f'{self.what}. Last good checkpoint: {checkpoint}.'
        ' Starting again repeats the same step; try a smaller optim.lr, a'
        " smaller optim.clip_norm or model.dtype='float32' in a new --workdir"
    )


def check_finite(
    step: int, metrics: Mapping[str, float], *, stage: str, last_checkpoint: str
) -> None:
  """Raises NonFiniteError if a metric is nan or infinite.

  Args:
    step: the update that the metrics belong to.
    metrics: names and values that must be finite.
    stage: name of the stage, for the message.
    last_checkpoint: `Checkpoints.describe_latest()`, for the message.
  """
  bad = {k: float(v) for k, v in metrics.items() if not math.isfinite(v)}
  if bad:
    raise NonFiniteError(stage, step, bad, last_checkpoint)


class MetricsWriter:
  """Sends metrics to all sinks; a context manager that closes them."""

  def __init__(
      self,
      folder: epath.PathLike,
      stage: str,
      *,
      sinks: Sequence[str],
      first_step: int = 1,
      flush_seconds: float = 10.0,
      config: Mapping[str, Any] | None = None,
  ) -> None:
    """Opens the sinks.

    Args:
      folder: of the stage; may be gs://. Parts go to `folder/metrics`,
        TensorBoard's events to `folder/tensorboard`.
      stage: written into each line.
      sinks: of SINKS; empty on processes that shall not write.
      first_step: the first step this start writes; TensorBoard hides what an
        earlier start wrote from there on.
      flush_seconds: how old a line may grow in memory before the next write
        brings it to disk; 0 = each at once.
      config: field -> value, which W&B shows beside the run.
    """
    folder = epath.Path(folder)
    about = _About(folder, stage, first_step, flush_seconds, config or {})
    self._sinks = [SINKS[name](about) for name in sinks]

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds a line; several lines of one step become one row when read."""
    values = {name: float(value) for name, value in metrics.items()}
    for sink in self._sinks:
      sink.write(int(step), values)

  def seal(self) -> None:
    """Brings all lines to disk for good.

    Call it just before a checkpoint of step k is saved, when every line of the
    steps up to k is written.
    """
    for sink in self._sinks:
      sink.seal()

  def close(self) -> None:
    """Brings all lines to disk and closes the sinks."""
    for sink in self._sinks:
      sink.close()


class _About(NamedTuple):
  """What a sink is told of a stage; the fields are those of MetricsWriter."""

  folder: epath.Path
  stage: str
  first_step: int
  flush_seconds: float
  config: Mapping[str, Any]


class _JsonLines:
  """The parts drawn in the module's docstring."""

  def __init__(self, about: _About) -> None:
    self._folder = about.folder / 'metrics'
    self._folder.mkdir(parents=True, exist_ok=True)
    atomic_file.remove_parts(self._folder)
    starts = (start for start, _, _ in _parts(about.folder))
    self._start = 1 + max(starts, default=0)
    self._part = 1
    self._stage = about.stage
    self._lines: list[str] = []
    self._flush_seconds = about.flush_seconds
    self._flushed = time.monotonic()

  def write(self, step: int, metrics: dict[str, float]) -> None:
    row = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
    row = {'step': step, 'stage': self._stage} | row
    self._lines.append(json.dumps(row, allow_nan=False) + '\n')
    if time.monotonic() - self._flushed >= self._flush_seconds:
      self._flush()

  def seal(self) -> None:
    if self._lines:
      self._flush()
      self._lines, self._part = [], self._part + 1

  def close(self) -> None:
    self.seal()

  def _flush(self) -> None:
    name = f'{self._start:04d}-{self._part:04d}.jsonl'
    atomic_file.write_text(self._folder / name, ''.join(self._lines))
    self._flushed = time.monotonic()


class _TensorBoard:
  """Scalars by step; opened anew by each start."""

  def __init__(self, about: _About) -> None:
    import tensorboardX

    first_step = about.first_step
    self._writer = tensorboardX.SummaryWriter(
        str(about.folder / 'tensorboard'),
        # A start from the beginning writes step 0 again.
        purge_step=first_step if first_step > 1 else 0,
        flush_secs=max(1, int(about.flush_seconds)),
        # Files are named by the second, which two quick starts may share.
        filename_suffix=f'.{first_step}',
    )

  def write(self, step: int, metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
      self._writer.add_scalar(name, value, step)

  def seal(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class _Wandb:
  """One run of Weights & Biases for a folder; a restart continues it."""

  def __init__(self, about: _About) -> None:
    import wandb

    workdir = about.folder.parent.name
    self._run = wandb.init(
        id=wandb_login.run_id(about.folder),
        name=f'{workdir}/{about.stage}',
        group=workdir,
        dir=wandb_login.local_folder(about.folder),
        config=dict(about.config),
        allow_val_change=True,  # a restart may differ in resumable fields
        resume='allow',
    )
    # W&B drops rows of steps that an earlier start logged already, so the step
    # is a metric like the others and serves as their axis.
    self._run.define_metric('*', step_metric='step')

  def write(self, step: int, metrics: dict[str, float]) -> None:
    self._run.log({'step': step} | metrics)

  def seal(self) -> None:
    pass

  def close(self) -> None:
    self._run.finish()


SINKS = {'jsonl': _JsonLines, 'tensorboard': _TensorBoard, 'wandb': _Wandb}


_PACKAGES = {'tensorboard': 'tensorboardX', 'wandb': 'wandb'}


def check_sinks(sinks: Sequence[str]) -> None:
  """Raises ImportError if the package of a sink is missing."""
  for name in sinks:
    package = _PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
      raise ImportError(
          f'log.sinks has {name!r}, which needs `pip install {package}`'
      )


def read_metrics(folder: epath.PathLike) -> list[dict[str, Any]]:
  """One row a step, sorted: {'step': int, 'stage': str, name: float, ...}.

  Where several starts wrote a step, the latest one's row counts. Rows of an
  earlier start beyond the last row of a later one stay (the later one was
  killed before it got there); a start that gets there writes the same bits,
  except for the fields under `time/` and `host/`.

  Args:
    folder: of the stage, as given to `MetricsWriter`.

  Returns:
    The rows; values that were not finite are float nan, inf and -inf again.
    Empty where nothing was written.

  Raises:
    ValueError: if a line is no metric line; a last line cut by a kill is
      ignored.
  """
  rows: dict[int, dict[str, Any]] = {}
  written_by: dict[int, int] = {}
  for start, _, path in _parts(epath.Path(folder)):
    for row in _read_part(path):
      step = row['step']
      same_start = written_by.get(step) == start
      rows[step] = (rows[step] if same_start else {}) | row
      written_by[step] = start
  return [rows[step] for step in sorted(rows)]


def _parts(folder: epath.Path) -> list[tuple[int, int, epath.Path]]:
  """(start, part, path) of the metric files of a stage, in order."""
  paths = (folder / 'metrics').glob('*-*.jsonl')
  return sorted((*map(int, path.stem.split('-')), path) for path in paths)


def _read_part(path: epath.Path) -> list[dict[str, Any]]:
  text = path.read_text()
  lines = text.splitlines()
  rows = []
  for i, line in enumerate(lines):
    try:
      row = json.loads(line)
      rows.append(
          {'step': row.pop('step'), 'stage': row.pop('stage')}
          | {name: float(value) for name, value in row.items()}
      )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
      if i == len(lines) - 1 and not text.endswith('\n'):
        break  # cut by a kill
      raise ValueError(
          f'{path} line {i + 1} is no metric line: {line[:80]!r}; restore the'
          ' file or delete it, which loses its steps'
      ) from error
  return rows
