"""A plan as text and as JSON."""

from collections.abc import Iterator, Sequence
import dataclasses
import importlib.metadata
from typing import Any

from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.parallel.mesh import AXES, mesh_shape
from ma_rlhf_jax.planning import plans, roofline
from ma_rlhf_jax.planning.planner import PASSES
from ma_rlhf_jax.planning.topology import GIB, Topology

# Stands for numbers that would be wrong, and says so.
_UNKNOWN = '?', 'not counted'

_SHOWN = ('model.remat', 'model.dtype', 'model.param_dtype', 'lora.rank')


def versions() -> dict[str, str]:
  """Of what compiles; '' where it is not installed."""
  found = {}
  for name in ('jax', 'jaxlib', 'libtpu'):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = ''
  return found


def setup(config: ConfigDict, topology: Topology) -> str:
  """Mesh, passes and options of a config, one line."""
  sizes = mesh_shape(config.mesh, topology.num_devices)
  mesh = ' '.join(f'mesh.{a}={n}' for a, n in zip(AXES, sizes, strict=True))
  flat = config_lib.flatten(config)
  stages = {name.partition('.')[0] for name in PASSES} & set(config.stages)
  passes = [
      f'{name}={flat[name]}'
      for name in PASSES
      if name.partition('.')[0] in stages | {'rollout'}
  ]
  options = [f'{name}={flat[name]}' for name in _SHOWN if flat.get(name)]
  return ' '.join([mesh, *passes, *options])


def changed(config: ConfigDict, base: ConfigDict) -> str:
  """The flags that make `config` of `base`."""
  old, new = config_lib.flatten(base), config_lib.flatten(config)
  return ' '.join(
      f'--config.{name}={value}'
      for name, value in new.items()
      if value != old[name]
  )


def _table(rows: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    first, *others = zip(row, widths, strict=True)
    cells = [first[0].ljust(first[1]), *(x.rjust(w) for x, w in others)]
    lines.append('  ' + '  '.join(cells))
  return '\n'.join(lines)


def _gib(size: float) -> str:
  return f'{size / GIB:.2f}'


def _programs(plan: plans.Plan) -> str:
  rows = [
      ('GiB of a device', 'args', 'temp', 'out', 'all', 'r/w', 'wire')
      + ('PFLOP', 'compute s', 'HBM s', 'wire s')
      + ('waits s', 'step s', 'bound by')
  ]
  for stage in plan.stages:
    for p in stage.programs:
      m, c, s = p.compiled.memory, p.compiled, p.seconds
      sizes = ['-', '-', '-']
      if m is not None:
        sizes = [_gib(m.args), _gib(m.temp), _gib(m.out)]
      moved = [f'{c.hbm_bytes / GIB:.4g}', f'{c.wire / GIB:.4g}']
      times = [
          f'{x:.3g}' for x in (s.compute, s.hbm, s.wire, s.latency, s.total)
      ]
      bound = s.bound
      if m is None or c.doubts:
        unknown, bound = ('-', 'does not fit') if m is None else _UNKNOWN
        moved, times[1:] = [unknown] * 2, [unknown] * 4
      rows.append(
          (p.name, *sizes, _gib(p.need), *moved, f'{c.flops / 1e15:.3g}')
          + (*times, bound)
      )
  return _table(rows)


def _sent_by_token(plan: plans.Plan) -> list[str]:
  programs = [p for stage in plan.stages for p in stage.programs]
  return [
      f'  {p.name}: {_gib(p.compiled.decode_wire)} of '
      f'{_gib(p.compiled.wire)} GiB are sent while tokens are drawn'
      for p in programs
      if p.compiled.decode_wire
  ]


def _set(stage: plans.StagePlan) -> str:
  """What stays and what comes on top, one line."""
  parts = ' + '.join(
      f'{name} {_gib(size)}'
      for name, size in stage.resident.items()
      if size > 0.005 * GIB
  )
  total = sum(stage.resident.values())
  return (
      f'{stage.name}: {parts} = {_gib(total)} stay; at most '
      f'{_gib(stage.peak.need - total)} more in {stage.peak.name}: '
      f'{_gib(stage.peak.need)}'
  )


def verdict(plan: plans.Plan) -> str:
  """Whether it fits and with what, one line."""
  setting = setup(plan.config, plan.topology)
  of = f'{_gib(plan.peak)} of {_gib(plan.hbm)} GiB a device'
  if plan.fits:
    return f'fits: {of}, with {setting}'
  short = plan.peak - plans.MARGIN * plan.hbm
  if plan.peak <= plan.hbm:
    return (
        f'tight: {of} is more than {plans.MARGIN:.0%}, short of a safe margin '
        f'by {_gib(short)} GiB, with {setting}'
    )
  return (
      f'does not fit: {of}, short of {plans.MARGIN:.0%} of it by {_gib(short)} '
      f'GiB, with {setting}'
  )


def _clock(seconds: float) -> str:
  if seconds < 120:
    return f'{seconds:.3g} s'
  return (
      f'{seconds / 60:.3g} min' if seconds < 7200 else f'{seconds / 3600:.3g} h'
  )


def _times(plan: plans.Plan, price: float | None) -> Iterator[str]:
  for stage in plan.stages:
    if not stage.counted:
      names = [p.name for p in stage.programs if p.compiled.doubts]
      yield f'{stage.name}: unknown, {", ".join(names)} cannot be counted'
      continue
    whole = f'; {stage.steps} steps {_clock(stage.steps * stage.seconds)}'
    each = f'{stage.name}: {_clock(stage.seconds)} a step'
    yield each + (whole if plan.rows else '')
  if not plan.rows:
    yield 'the whole recipe: unknown, since the rows are; give --rows'
    return
  if not plan.counted:
    yield 'the whole recipe: unknown, since not all of its steps are counted'
    return
  chips = plan.topology.num_chips
  hours = plan.seconds / 3600 * chips
  cost = f', {hours * price:,.2f} at {price:g} an hour' if price else ''
  yield (
      f'the whole recipe ({plan.rows:,} rows): {_clock(plan.seconds)} on '
      f'{chips} chip(s) = {hours:.3g} chip hours{cost}'
      + ('' if price else ' (--price)')
  )


def _buffers(plan: plans.Plan) -> Iterator[str]:
  for stage in plan.stages:
    p = stage.peak
    if p.compiled.memory is not None and p.compiled.memory.largest:
      shown = ', '.join(
          f'{_gib(b.size)} {b.shape} ({b.value})'
          for b in p.compiled.memory.largest
      )
      yield f'{p.name}: {shown}'


def _doubts(plan: plans.Plan) -> Iterator[str]:
  for stage in plan.stages:
    for p in stage.programs:
      for line in p.compiled.doubts:
        yield (
            f'NOT COUNTED: {p.name}: {line}, so what it moves and how long it '
            'takes are unknown; its memory is not in doubt'
        )


def text(plan: plans.Plan, shares: roofline.Shares, price: float | None) -> str:
  """The plan for people.

  Args:
    plan: of all stages.
    shares: what the seconds rest on.
    price: of a chip for an hour, in any currency; None = not given.
  """
  found = versions()
  how = (
      f'compiled by libtpu {found["libtpu"]} for jaxlib {found["jaxlib"]}; '
      'nothing was run'
  )
  if plan.topology.platform == 'gpu':
    how = 'by formula: sizes of the arrays are exact, temporaries are not'
  warned = [
      f'{p.name}: {line}'
      for stage in plan.stages
      for p in stage.programs
      for line in p.warnings
  ]
  parts = [
      f'{plan.topology.name}: {plan.topology.num_chips} chip(s), '
      f'{plan.topology.num_devices} device(s) of {_gib(plan.hbm)} GiB; {how}',
      _programs(plan),
      *_sent_by_token(plan),
      'what stays on a device, and the most that a program adds, GiB:',
      *(f'  {_set(stage)}' for stage in plan.stages),
      *(['largest temporaries, GiB:'] if any(_buffers(plan)) else []),
      *(f'  {line}' for line in _buffers(plan)),
      *_doubts(plan),
      *(f'warning: {line}' for line in warned),
      'time, a bound by the slowest of three terms:',
      *(f'  {line}' for line in _times(plan, price)),
      *(f'  {line}' for line in roofline.assumptions(plan.topology, shares)),
      verdict(plan),
  ]
  return '\n'.join(parts)


def _json_program(p: plans.ProgramPlan) -> dict[str, Any]:
  c = p.compiled
  return {
      'memory': c.memory and dataclasses.asdict(c.memory),
      'need_bytes': p.need,
      'flops': c.flops,
      'doubts': list(c.doubts),
      'hbm_bytes': None if c.doubts else c.hbm_bytes,
      'wire_bytes': None if c.doubts else c.wire,
      'decode_loop_wire_bytes': None if c.doubts else c.decode_wire,
      'seconds': None
      if c.doubts
      else dataclasses.asdict(p.seconds) | {'total': p.seconds.total},
      'warnings': list(p.warnings),
      'collectives': [
          {
              'kind': s.kind,
              'shapes': [f'{a.dtype}{list(a.dims)}' for a in s.arrays],
              'group': s.group,
              'trips': [loop.trips for loop in s.loops],
              'bytes': s.total,
              'op_name': s.op_name,
          }
          for s in sorted(c.collectives, key=lambda s: -s.total)[:20]
      ],
  }


def as_json(
    plan: plans.Plan, given: ConfigDict, price: float | None
) -> dict[str, Any]:
  """The plan for programs; bytes, seconds and FLOPs, of a device where not.

  Args:
    plan: of all stages.
    given: the config that was asked about; `flags` lead from it to the plan.
    price: of a chip for an hour; None = not given.
  """
  return {
      'topology': plan.topology.name,
      'chips': plan.topology.num_chips,
      'devices': plan.topology.num_devices,
      'by_formula': plan.topology.platform == 'gpu',
      'versions': versions(),
      'hbm_bytes': plan.hbm,
      'peak_bytes': plan.peak,
      'fits': plan.fits,
      'setup': setup(plan.config, plan.topology),
      'flags': changed(plan.config, given),
      'config': config_lib.flatten(plan.config),
      'price': price,
      'counted': plan.counted,
      'seconds': plan.seconds if plan.rows and plan.counted else None,
      'cost': plan.seconds / 3600 * plan.topology.num_chips * price
      if plan.rows and plan.counted and price
      else None,
      'stages': {
          stage.name: {
              'steps': stage.steps,
              'seconds': stage.seconds if stage.counted else None,
              'resident_bytes': stage.resident,
              'programs': {p.name: _json_program(p) for p in stage.programs},
          }
          for stage in plan.stages
      },
  }
