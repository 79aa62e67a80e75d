"""Checkpoints of one stage: the newest few and the best, saved in background.

A step is one folder with two items, committed together:

  <folder>/<step>/state   a dict of pytrees, {'policy': TrainState, ...}
  <folder>/<step>/meta    JSON: step, position in the data, root key, metric
  <folder>/<step>/ma_rlhf_manifest.json   the SHA-256 of each file of both

An interrupted save leaves a folder `<step>.orbax-checkpoint-tmp...`, which is
never read and is removed at the next start; an interrupted removal of an old
step leaves part of it, which the next save removes. A folder that cannot be
restored is renamed to `damaged-<step>` once an older one could be, so that its
step can be saved again. Orbax notices missing, cut and unreadable files; it
does not notice a flipped bit: `step_digests` compares every file first.
"""

from collections.abc import Iterator, Sequence
import contextlib
import logging
import math
import os
from typing import Any, NamedTuple

from absl import logging as absl_logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from ma_rlhf_jax.parallel import processes
from ma_rlhf_jax.training import kept_steps, step_digests

State = dict[str, Any]

_log = logging.getLogger(__name__)

# What Orbax raises for a damaged step: a missing file; a missing item; broken
# JSON, manifests and text, and other shapes, dtypes or trees than asked for.
# The last: what another process found.
_DAMAGE = (FileNotFoundError, KeyError, ValueError, processes.ProcessError)


class CheckpointError(RuntimeError):
  """No checkpoint could be restored although there are some."""


class Restored(NamedTuple):
  """One restored checkpoint: its step, the dict of pytrees, the JSON meta."""

  step: int
  state: State
  meta: dict[str, Any]


class Checkpoints:
  """Saves and restores the state of one stage; a context manager."""

  def __init__(
      self, folder: epath.PathLike, *, keep: int, best_metric: str
  ) -> None:
    """Opens the folder and creates it where it is missing.

    Args:
      folder: absolute path, may be gs://.
      keep: how many of the newest stay on disk, beside the best; >= 1.
      best_metric: name of the metric that decides which is best; a leading '-'
        means that less is better. Values saved under another name count for
        nothing.
    """
    self.folder = epath.Path(folder)
    self._sign = -1.0 if best_metric.startswith('-') else 1.0
    self._metric = best_metric.removeprefix('-')
    self._quality: dict[int, float] = {}
    handler = step_digests.StateHandler()
    self._manager = _Manager(
        self.folder,
        item_handlers={
            'state': handler,
            'meta': ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=handler.write_manifest
            ),
            preservation_policy=kept_steps.NewestAndBest(keep, self._quality),
            cleanup_tmp_directories=True,
            # Folders may be seen late by other hosts; all must agree.
            single_host_load_and_broadcast=not processes.alone(),
        ),
    )
    for step in self.steps():
      self._read_quality(step)

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Steps on disk and the one being saved, oldest first."""
    return list(self._manager.all_steps())

  def best_step(self) -> int | None:
    """The step with the best metric, the newest of equals; None if none."""
    return kept_steps.best(self.steps(), self._quality)

  def describe_latest(self) -> str:
    """Words for messages: where the newest checkpoint lies, or that none is."""
    steps = self.steps()
    if not steps:
      return 'none yet'
    return f'step {steps[-1]} in {self.folder / str(steps[-1])}'

  def save(
      self,
      step: int,
      state: State,
      meta: dict[str, Any],
      *,
      metric: float | None,
  ) -> None:
    """Starts saving; returns when `state` may be donated or changed.

    Args:
      step: updates done; larger than every step saved before.
      state: a dict of pytrees of arrays.
      meta: JSON values; `step`, `metric_name` and `metric` are added.
      metric: value of `best_metric` at this step; None where it was not
        evaluated. None, nan and infinities are never best.

    Raises:
      ValueError: if this step or a later one is there already.
      Exception: what went wrong with the save before this one.
    """
    steps = self.steps()
    if steps and step <= steps[-1]:
      raise ValueError(
          f'cannot save step {step} in {self.folder}: step {steps[-1]} is there'
          ' already; steps must grow'
      )
    if metric is not None:
      metric = float(metric) if math.isfinite(metric) else None
    meta = meta | {'step': step, 'metric_name': self._metric, 'metric': metric}
    if metric is not None:
      self._quality[step] = self._sign * metric
    self._manager.save(
        step,
        args=ocp.args.Composite(
            state=step_digests.StateSave(state), meta=ocp.args.JsonSave(meta)
        ),
        force=True,
    )

  def restore_latest(self, abstract: State) -> Restored | None:
    """The newest checkpoint that can be restored, or None if there is none.

    Args:
      abstract: the tree to restore, of `jax.ShapeDtypeStruct` with shardings;
        see `abstract_of`.

    Raises:
      CheckpointError: if there are checkpoints but none fits and is whole.
    """
    self.finish()
    failures: dict[int, str] = {}
    for step in reversed(self.steps()):
      restored = self._try(step, abstract, failures)
      if restored is not None:
        if failures:
          self._set_aside(list(failures))
        return restored
      _log.warning(
          'checkpoint %s cannot be restored (%s); trying the one before',
          self.folder / str(step),
          failures[step],
      )
    if failures:
      raise CheckpointError(self._all_failed(failures))
    return None

  def restore_best(self, abstract: State) -> Restored | None:
    """The checkpoint with the best metric, or None where none has a metric.

    Args:
      abstract: as for `restore_latest`.

    Raises:
      CheckpointError: if that checkpoint is damaged or does not fit.
    """
    self.finish()
    step = self.best_step()
    if step is None:
      return None
    failures: dict[int, str] = {}
    restored = self._try(step, abstract, failures)
    if restored is None:
      raise CheckpointError(
          f'{self._all_failed(failures)}; or export the last one instead:'
          " export.which='last'"
      )
    return restored

  def restore_before(self, step: int, abstract: State) -> Restored | None:
    """The newest checkpoint before `step` that can be restored; None if none.

    Args:
      step: the one that shall not be used.
      abstract: as for `restore_latest`.
    """
    self.finish()
    failures: dict[int, str] = {}
    for older in reversed([s for s in self.steps() if s < step]):
      restored = self._try(older, abstract, failures)
      if restored is not None:
        return restored
    return None

  @contextlib.contextmanager
  def without(self, step: int) -> Iterator[None]:
    """A block that may save `step` again, whose folder is set aside.

    It stays aside where the block succeeds. Otherwise it comes back, unless the
    block has saved the same step once more; then it is removed.
    """
    quality = self._quality.get(step)
    (aside,) = self._set_aside([step])
    try:
      yield
    except FloatingPointError:
      self.finish()
      if step in self.steps():
        if jax.process_index() == 0:
          aside.rmtree()
      else:
        self._rename(aside, self.folder / str(step))
        if quality is not None:
          self._quality[step] = quality
      self._manager.reload()
      raise

  def finish(self) -> None:
    """Waits until the running save is committed; raises what it failed with."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the running save and releases threads."""
    self._manager.close()

  def _read_quality(self, step: int) -> None:
    try:
      with processes.together():
        step_digests.verify_meta(self.folder / str(step))
      meta = self._manager.restore(
          step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
      ).meta
      name, value = meta['metric_name'], meta['metric']
    except _DAMAGE as error:
      _log.warning(
          'checkpoint %s has no readable meta and cannot be the best: %s',
          self.folder / str(step),
          _reason(error),
      )
      return
    if name == self._metric and value is not None:
      self._quality[step] = self._sign * value

  def _try(
      self, step: int, abstract: State, failures: dict[int, str]
  ) -> Restored | None:
    """The checkpoint of `step`; None, with the reason in `failures`."""
    try:
      with processes.together():
        step_digests.verify(self.folder / str(step))
      with processes.together():
        _check_dtypes(abstract, self._manager.item_metadata(step)['state'])
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=step_digests.StateRestore(abstract),
                meta=ocp.args.JsonRestore(),
            ),
        )
    # Orbax 0.12.8 raises a bare Exception where data cannot be read; every
    # other type than that and _DAMAGE goes on its way.
    except Exception as error:
      if type(error) is not Exception and not isinstance(error, _DAMAGE):
        raise
      failures[step] = _reason(error)
      return None
    return Restored(step, items.state, items.meta)

  def _set_aside(self, steps: Sequence[int]) -> list[epath.Path]:
    """Renames the folders of steps, and returns their new names."""
    targets = []
    for step in steps:
      self._quality.pop(step, None)
      target, n = self.folder / f'damaged-{step}', 1
      while target.exists():
        target, n = self.folder / f'damaged-{step}-{n}', n + 1
      targets.append(target)
      self._rename(self.folder / str(step), target)
    self._manager.reload()
    return targets

  def _rename(self, old: epath.Path, new: epath.Path) -> None:
    """Renames a folder, on the first process, before any goes on."""
    multihost_utils.sync_global_devices(f'{old.name} is to be {new.name}')
    if jax.process_index() == 0:
      old.rename(new)
    multihost_utils.sync_global_devices(f'{old.name} is {new.name}')

  def _all_failed(self, failures: dict[int, str]) -> str:
    reasons = '; '.join(f'step {s}: {why}' for s, why in failures.items())
    return (
        f'{len(failures)} checkpoint(s) tried in {self.folder}, none could be'
        f' restored ({reasons}). Run with the config, the tokenizer and the'
        ' versions that saved them, or delete the folder to start this stage'
        ' again'
    )


class _Manager(ocp.CheckpointManager):
  """Orbax's, without its own look at the signal to stop.

  jax tells the processes to stop at one number of a single count. Orbax would
  count steps there, beside `processes.preempted`.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def abstract_of(state: State) -> State:
  """Shapes, dtypes and shardings of `state`, to restore onto.

  What stands in it several times is described by one object.
  """
  made: dict[int, jax.ShapeDtypeStruct] = {}

  def describe(x: Any) -> jax.ShapeDtypeStruct:
    if id(x) not in made:
      made[id(x)] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return made[id(x)]

  return jax.tree.map(describe, state)


def quiet_logging() -> None:
  """Hides what libraries log below WARNING; entry points call it once."""
  logging.getLogger('absl').addFilter(_is_no_chatter)
  absl_logging.get_absl_handler().setFormatter(_Plain())
  for name in ('jax', 'datasets'):
    logging.getLogger(name).setLevel(logging.WARNING)
  # It says that PyTorch, which nothing here uses, is missing.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')


class _Plain(absl_logging.PythonFormatter):
  """What goes on, without the prefix that warnings have."""

  def format(self, record: logging.LogRecord) -> str:
    if record.levelno == logging.INFO:
      return record.getMessage()
    return super().format(record)


def _is_no_chatter(record: logging.LogRecord) -> bool:
  return record.levelno >= logging.WARNING or 'orbax' not in record.pathname


def _check_dtypes(abstract: State, stored: Any) -> None:
  """Raises where Orbax would cast; it compares shapes and names itself."""
  have, want = _dtypes(stored), _dtypes(abstract)
  for path in have.keys() & want.keys():
    if have[path] != want[path]:
      raise ValueError(
          f'{path} was saved as {have[path]} and is wanted as {want[path]}'
      )


def _dtypes(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf.dtype
      for path, leaf in leaves
      if hasattr(leaf, 'dtype')
  }


def _reason(error: Exception) -> str:
  """The first 300 characters of an error, on one line, with its type."""
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text[:300]}'
