"""The loop around every stage: resume, log, evaluate, save, profile."""

import abc
from collections.abc import Iterator
import contextlib
import logging
import time
import traceback
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import interrupts
from ma_rlhf_jax.data import batches
from ma_rlhf_jax.data.encoding import EncodedSet
from ma_rlhf_jax.parallel import processes
from ma_rlhf_jax.structs import Array, TrainState
from ma_rlhf_jax.training import checkpoint, console, health, symptoms
from ma_rlhf_jax.training import metrics as metrics_lib
from ma_rlhf_jax.training.checkpoint import Checkpoints
from ma_rlhf_jax.training.run import Run

_log = logging.getLogger(__name__)

# What an update was made of, or what it has made, cannot be used.
_BROKEN = (metrics_lib.NonFiniteError, health.RuinedError)

States = dict[str, TrainState | Array]  # models, and scalars beside them


class Stage(abc.ABC):
  """What differs between SFT, reward model and PPO.

  Attributes:
    run: what the stages share.
    name: of the stage and of its folder in the workdir.
    config: the stage's block of the config.
    data: the rows it trains on.
    num_steps: updates in all.
    best_metric: decides the best checkpoint; '-' = less is better.
    shown: metrics on the progress bar.
    states: what is trained, before the first update.
    watch: looks for symptoms of a failed run.
  """

  shown: tuple[str, ...]
  states: States

  def __init__(self, run: Run, name: str, config: ConfigDict, data: EncodedSet):
    self.run, self.name, self.config, self.data = run, name, config, data
    self.num_steps = config_lib.num_steps(config, len(data))
    self.best_metric = run.config.checkpoint.best_metric[name]
    self.watch = symptoms.Watch(name, run.config, len(run.data.eval))

  def rows(self, index: int) -> np.ndarray:
    """The rows of the update number `index`, a function of it and the seed."""
    return batches.rows_of_step(
        self.run.config.seed,
        index,
        size=len(self.data),
        batch_size=self.config.batch_size,
    )

  @property
  def micro_size(self) -> int:
    """Sequences or pairs in one pass."""
    return self.config.micro_batch_size or self.config.batch_size

  @abc.abstractmethod
  def step(self, states: States, index: int) -> tuple[States, dict[str, Any]]:
    """The states after update number `index`, and its metrics.

    One metric is `tokens`, the real tokens that the update has seen.
    """

  @abc.abstractmethod
  def evaluate(self, states: States) -> dict[str, float]:
    """Metrics on held-out rows."""

  @abc.abstractmethod
  def samples(self, states: States) -> str:
    """A small table of what the evaluation just before has seen."""

  def best_value(self, metrics: dict[str, float]) -> float | None:
    """The value of `best_metric`, or None where this step may not be best."""
    return metrics.get(self.best_metric.removeprefix('-'))


class _Trace:
  """Writes a profiler trace of the updates first..last of one stage."""

  def __init__(self, stage: Stage, folder: epath.Path):
    profile = stage.run.config.profile
    steps = tuple(profile.steps) if profile.stage == stage.name else ()
    self._first, self._last = steps or (0, 0)
    self._last = min(self._last, stage.num_steps)
    self._folder = str(folder / 'profile')
    self._on = False

  def before(self, step: int) -> None:
    is_due = self._first <= step <= self._last
    if is_due and not self._on and processes.is_first():
      jax.profiler.start_trace(self._folder)
      self._on = True

  def after(self, step: int, states: States) -> None:
    if self._on and step == self._last:
      jax.block_until_ready(states)
      jax.profiler.stop_trace()
      self._on = False


class _Log:
  """Tells of updates, each one update late, so that no device ever waits."""

  def __init__(
      self,
      stage: Stage,
      writer: metrics_lib.MetricsWriter,
      progress: console.Progress,
      checkpoints: Checkpoints,
  ):
    self._stage, self._writer = stage, writer
    self._progress, self._checkpoints = progress, checkpoints
    self._pending: tuple[int, dict[str, Any], float] | None = None
    self.restart_clock()

  def restart_clock(self) -> None:
    """The next update's seconds count from here."""
    self._last = time.monotonic()

  def add(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes the metrics of an update and writes those of the one before."""
    self.flush()
    now = time.monotonic()
    self._pending = step, metrics, now - self._last
    self._last = now

  def check(self, step: int, metrics: dict[str, float]) -> None:
    """Stops the run on a value that is not finite."""
    metrics_lib.check_finite(
        step,
        metrics,
        stage=self._stage.name,
        last_checkpoint=self._checkpoints.describe_latest(),
    )

  def evaluate(self, step: int, states: States) -> dict[str, float]:
    """Metrics on held-out rows, told and written; stops on a symptom."""
    stage = self._stage
    self.flush()
    metrics = stage.evaluate(states)
    self.check(step, metrics)
    self._writer.write(step, metrics)
    self._progress.message(f'{stage.name} step {step}: {_words(metrics)}')
    if stage.run.config.log.samples:
      self._progress.message(stage.samples(states))
    stage.watch.note(metrics)
    for line in stage.watch.check(step == stage.num_steps):
      self._progress.message(f'symptom at {stage.name} step {step}: {line}')
    stage.watch.stops(step, self._checkpoints.describe_latest())
    self.restart_clock()
    return metrics

  def save(self, step: int, states: States, best: float | None) -> None:
    """A checkpoint of sound states, behind the metrics that led to it."""
    self.flush()
    _check_states(self._stage, step, states, self._checkpoints)
    self._writer.seal()
    meta = _meta(self._stage, step)
    self._checkpoints.save(step, states, meta, metric=best)
    self.restart_clock()

  def flush(self) -> None:
    """Writes what is pending; stops the run on a value that is not finite."""
    if self._pending is None:
      return
    step, metrics, seconds = self._pending
    self._pending = None
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    self.check(step, metrics)
    self._stage.watch.note(metrics)
    tokens = int(metrics.pop('tokens'))
    shown = {name: metrics[name] for name in self._stage.shown}
    self._progress.update(step, tokens, seconds, shown)
    if step % self._stage.run.config.log.every == 0:
      speed = {
          'time/seconds': seconds,
          'time/tokens_per_second': tokens / seconds,
      }
      self._writer.write(step, {**metrics, **speed})


def _meta(stage: Stage, step: int) -> dict[str, Any]:
  """What a checkpoint says beside its arrays."""
  epoch, row = divmod(step * stage.config.batch_size, len(stage.data))
  root = jax.random.key_data(jax.random.key(stage.run.config.seed))
  return {
      'stage': stage.name,
      'data_position': {'epoch': epoch, 'row': row},
      'root_key': np.asarray(root).tolist(),
      'config': config_lib.fingerprint(stage.run.config),
      'data': stage.data.digest,
      'symptoms': stage.watch.state(),
  }


def _check_rows(stage: Stage, restored: checkpoint.Restored) -> None:
  """A checkpoint's position in the data means nothing in other rows."""
  if restored.meta['data'] != stage.data.digest:
    raise checkpoint.CheckpointError(
        f'{stage.name}: the rows of {stage.run.config.data.path!r} are not '
        f'those that the checkpoint of step {restored.step} was trained on; '
        'restore them, or start in a new --workdir'
    )


def _due(step: int, every: int, last: int) -> bool:
  return step == last or bool(every) and step % every == 0


def _best(
    stage: Stage, last: States, abstract: States, checkpoints: Checkpoints
) -> tuple[States, int]:
  """States and step of the best checkpoint; the last ones where none may be."""
  best = checkpoints.restore_best(abstract)
  if best is None:
    print(f'{stage.name}: no checkpoint may be best; the last is exported')
    return last, stage.num_steps
  stage.watch.restore_best(best.meta.get('symptoms', {}))
  return best.state, best.step


def run_stage(stage: Stage) -> tuple[States, int]:
  """Trains a stage from its newest checkpoint, or from the start, to its end.

  A step is the number of updates done: line k of the metrics tells of update k
  (1, 2, ...) and of the evaluation after it; step 0 is the evaluation before.

  Returns:
    The states to go on with (of the last or of the best checkpoint, as
    `export.which` says) and their step.

  Raises:
    NonFiniteError: on a metric that is not finite.
    SymptomError: on a symptom of a failed run that `stop` names.
    RuinedError: before states that are not sound would be saved or returned.
    Preempted: after a signal to stop, once the update it came in is saved.
  """
  c = stage.run.config
  folder = stage.run.workdir / stage.name
  abstract = checkpoint.abstract_of(stage.states)
  started = (folder / 'checkpoints').exists()
  with checkpoint.Checkpoints(
      folder / 'checkpoints',
      keep=c.checkpoint.keep,
      best_metric=stage.best_metric + stage.run.data.eval_mark,
  ) as checkpoints:
    restored = checkpoints.restore_latest(abstract)
    if restored is None and started:
      print(f'{stage.name}: no checkpoint yet, starting at 0', flush=True)
    try:
      states = _go_on(stage, restored, checkpoints)
    except _BROKEN as error:
      suspect = checkpoints.steps()[-1] if checkpoints.steps() else 0
      # Once a step is saved, what it was made of has proved good.
      if restored is None or restored.step != suspect:
        raise
      del restored
      traceback.clear_frames(error.__traceback__)  # they hold the states
      states = _go_on_from_before(stage, error, abstract, checkpoints)
    step = stage.num_steps
    if stage.run.config.export.which == 'best':
      states, step = _best(stage, states, abstract, checkpoints)
    _check_states(stage, step, states, checkpoints)
  return states, step


def _go_on(
    stage: Stage, restored: checkpoint.Restored | None, checkpoints: Checkpoints
) -> States:
  """Trains to the end, after a checkpoint or from the start."""
  first, states = 0, stage.states
  if restored:
    _check_rows(stage, restored)
    first, states = restored.step, restored.state
    stage.watch.restore(restored.meta.get('symptoms', {}))
    _check_states(stage, first, states, checkpoints)
  stage.states = {}  # donated by the first update
  return _train(stage, states, first, checkpoints)


def _go_on_from_before(
    stage: Stage,
    error: metrics_lib.NonFiniteError | health.RuinedError,
    abstract: States,
    checkpoints: Checkpoints,
) -> States:
  """Trains on after the checkpoint before the newest, which has led nowhere.

  The newest may be damaged in a way that its digests do not show, or have been
  saved without them. Where the older one leads to the same end the newest was
  sound: it comes back, and the error stands.
  """
  suspect = checkpoints.steps()[-1]
  restored = checkpoints.restore_before(suspect, abstract)
  if restored is None:
    raise error
  _log.warning(
      '%s; the checkpoint of step %d may be damaged, so it is set aside and '
      'training goes on after step %d',
      error.what,
      suspect,
      restored.step,
  )
  with checkpoints.without(suspect):
    return _go_on(stage, restored, checkpoints)


def _check_states(
    stage: Stage, step: int, states: States, checkpoints: Checkpoints
) -> None:
  """Stops the run before states that are not sound are saved or handed on."""
  if problem := health.problem(states):
    raise health.RuinedError(
        stage.name, step, problem, checkpoints.describe_latest()
    )


@contextlib.contextmanager
def _step_named(
    stage: Stage, step: int, checkpoints: Checkpoints
) -> Iterator[None]:
  """What the device reports, out of memory say, is told with the step."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    error.add_note(
        f'{stage.name} stopped at step {step}; last good checkpoint: '
        f'{checkpoints.describe_latest()}'
    )
    raise


def _train(
    stage: Stage, states: States, first: int, checkpoints: Checkpoints
) -> States:
  """The updates first + 1 .. num_steps."""
  c = stage.run.config
  folder = stage.run.workdir / stage.name
  trace = _Trace(stage, folder)
  with (
      metrics_lib.MetricsWriter(
          folder,
          stage.name,
          sinks=c.log.sinks if processes.is_first() else (),
          first_step=first + 1,
          config=config_lib.flatten(c),
      ) as writer,
      console.Progress(
          stage.name, stage.num_steps, first, silent=not processes.is_first()
      ) as progress,
      interrupts.at_end(writer.seal),
  ):
    log = _Log(stage, writer, progress, checkpoints)
    if first == 0:
      log.evaluate(0, states)
    else:
      progress.message(f'{stage.name}: goes on after step {first}')
    for index in range(first, stage.num_steps):
      step = index + 1
      trace.before(step)
      with _step_named(stage, step, checkpoints):
        states, metrics = stage.step(states, index)
      trace.after(step, states)
      log.add(step, metrics)
      save = _due(step, c.checkpoint.every, stage.num_steps)
      stop, best = processes.preempted(), None
      if save or _due(step, stage.config.eval_every, stage.num_steps):
        best = stage.best_value(log.evaluate(step, states))
      if save or stop:
        log.save(step, states, best)
      if stop:
        checkpoints.finish()
        raise processes.Preempted(f'{stage.name} has saved step {step}')
  return states


def _words(metrics: dict[str, float]) -> str:
  return ', '.join(f'{name} {value:.4g}' for name, value in metrics.items())
