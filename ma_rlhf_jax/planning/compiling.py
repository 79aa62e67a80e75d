"""Runs the children that compile, and reads what they leave.

The answer is there once XLA has assigned buffers, after a tenth of the time of
a compile; then the child is ended, unless the whole compile is wanted.
"""

from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import interrupts
from ma_rlhf_jax.planning import buffers, hlo, loops, traffic
from ma_rlhf_jax.planning.topology import Topology

_ASSIGNMENT = '*after_optimizations-buffer-assignment.txt'
SCHEDULED = '*after_optimizations_after_buffer_assignment.txt'
_LAST = '*debug_options'  # written after both

# Seconds without a write after which a dump is taken as whole.
_SETTLED = 0.3

# Each silences libtpu, or keeps it off devices, files and locks of others.
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_LOG_DIR': 'disabled',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'JAX_ENABLE_COMPILATION_CACHE': 'false',  # it cannot hold these
    'XLA_FLAGS': '',  # one that libtpu does not know would end it
}


class CompileError(RuntimeError):
  """A child ended without an answer."""


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a compiled program does to one device.

  Attributes:
    memory: bytes; None where it does not fit even alone.
    required: bytes that the compiler asked for in vain.
    flops: of all devices together.
    resident_args: bytes of arguments that stay.
    other_args: bytes of arguments that come with a step.
    hbm_bytes: read and written.
    wire: bytes that pass it.
    collectives: what it sends; empty where it does not fit.
    weights: shapes of matrices among its arguments, the table first by rows.
    doubts: why bytes and seconds do not follow from what the compiler wrote;
      empty where they do.
    waits: seconds of latency where a formula tells them; None = those of the
      collectives.
  """

  memory: buffers.Memory | None
  required: int
  flops: int
  resident_args: int
  other_args: int
  hbm_bytes: float = 0
  wire: float = 0
  collectives: tuple[traffic.Collective, ...] = ()
  weights: tuple[tuple[int, ...], ...] = ()
  doubts: tuple[str, ...] = ()
  waits: float | None = None

  @property
  def decode_wire(self) -> float:
    """Bytes that pass the wire while tokens are drawn."""
    return sum(c.total for c in self.collectives if c.in_decode_loop)


def doubts(module: hlo.Module) -> tuple[str, ...]:
  """Why bytes cannot be counted in a program, one line each."""
  lines = []
  if loop := loops.uncounted(module):
    lines.append(f'the text tells no number of trips for {_some(loop)}')
  if module.unread:
    lines.append(f'no line of the text makes {_some(module.unread)}')
  return tuple(lines)


def _some(names: tuple[str, ...]) -> str:
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more


def _environment(topology: Topology) -> dict[str, str]:
  made = {**os.environ, **ENVIRONMENT}
  if topology.platform == 'gpu':
    flag = f'--xla_force_host_platform_device_count={topology.num_devices}'
    made['XLA_FLAGS'] = flag
  return made


class Child:
  """A process that does one job; see `planning.child`.

  Attributes:
    program: name, '' for the survey.
  """

  def __init__(
      self,
      config: config_lib.ConfigDict,
      topology: Topology,
      program: str = '',
      *,
      rows: int | None = None,
      full: bool = False,
      **more: bool,
  ):
    self.program, self._full = program, full
    self._folder = tempfile.TemporaryDirectory(prefix='plan_')
    self._path = pathlib.Path(self._folder.name)
    self._dump = self._path / 'dump'
    job = {
        'config': config_lib.flatten(config),
        'topology': topology.name,
        'program': program,
        'rows': rows,
        'caller': os.getpid(),
        'dump': str(self._dump),
        'facts': str(self._path / 'facts.json'),
        'answer': str(self._path / 'answer.json'),
        **more,
    }
    (self._path / 'job.json').write_text(json.dumps(job))
    self._interrupted = contextlib.ExitStack()
    with interrupts.held():
      self._process = self._start(_environment(topology))
      self._interrupted.enter_context(interrupts.at_end(self.close))

  def _start(self, environment: dict[str, str]) -> subprocess.Popen:
    module = 'ma_rlhf_jax.planning.child'
    with (self._path / 'log').open('w') as log:
      return subprocess.Popen(
          [sys.executable, '-m', module, str(self._path / 'job.json')],
          env=environment,
          stdout=log,
          stderr=log,
          process_group=0,  # the Ctrl-C of a terminal is for the caller alone
      )

  def _dumped(self, pattern: str) -> pathlib.Path | None:
    return next(iter(sorted(self._dump.glob(pattern))), None)

  @property
  def done(self) -> bool:
    """Whether the answer is there, or never will be."""
    if self._process.poll() is not None:
      return True
    if self._full or not self.program:
      return False
    found = [self._dumped(p) for p in (_ASSIGNMENT, SCHEDULED, _LAST)]
    if None in found:
      return False
    # XLA may name the last file while it still writes the others.
    written = max(path.stat().st_mtime for path in found)
    if time.time() - written < _SETTLED:
      return False
    _, _, entry = found[1].read_text().rpartition('\nENTRY ')
    return '\n}' in entry

  def close(self) -> None:
    """Ends the process and removes its files."""
    if self._process.poll() is None:
      self._process.kill()
    self._process.wait()
    self._folder.cleanup()
    self._interrupted.close()

  def _json(self, name: str) -> dict[str, Any]:
    path = self._path / f'{name}.json'
    if not path.is_file():
      log = (self._path / 'log').read_text().strip().splitlines()
      raise CompileError(
          f'{self.program or "the survey"}: the compiling process ended with '
          f'status {self._process.poll()}; its last lines:\n  '
          + '\n  '.join(log[-8:])
      )
    return json.loads(path.read_text())

  def survey(self) -> dict[str, Any]:
    """The answer of a child without a program."""
    return self._json('answer')

  def compiled(self) -> Compiled:
    """The answer of a child with a program; its process may still run."""
    ended = self._process.poll() is not None
    answer = self._json('answer') if ended else {}
    facts = self._json('facts')
    known = {k: facts[k] for k in ('flops', 'resident_args', 'other_args')}
    if 'required' in answer:
      required = answer['required'] or 0
      return Compiled(memory=None, required=required, **known)
    found = [self._dumped(pattern) for pattern in (_ASSIGNMENT, SCHEDULED)]
    if None in found:
      raise CompileError(
          f'{self.program}: the compiler left no buffer assignment in its dump;'
          ' is this the libtpu of the `plan` extra?'
      )
    memory = buffers.parse(found[0].read_text())
    if answer:
      memory = dataclasses.replace(memory, **answer)
    module = hlo.parse(found[1].read_text())
    sent = tuple(traffic.collectives(module))
    return Compiled(
        memory=memory,
        required=memory.need,
        hbm_bytes=traffic.hbm_bytes(module),
        wire=sum(c.total for c in sent),
        collectives=sent,
        weights=tuple(map(tuple, facts['weights'])),
        doubts=doubts(module),
        **known,
    )


def run_all(
    makers: Iterable[Callable[[], Child]],
    jobs: int,
    take: Callable[[Child], bool],
) -> None:
  """Runs children, so many at once.

  Args:
    makers: start one child each, in this order.
    jobs: processes at once.
    take: is given each child that is done; false ends all the others.
  """
  waiting, running = list(makers), []
  try:
    while waiting or running:
      while waiting and len(running) < jobs:
        running.append(waiting.pop(0)())
      for child in [c for c in running if c.done]:
        running.remove(child)
        try:
          go_on = take(child)
        finally:
          child.close()
        if not go_on:
          return
      time.sleep(0.05)
  finally:
    for child in running:
      child.close()
