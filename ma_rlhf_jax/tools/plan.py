"""Plans a run before a machine is rented: `python -m ma_rlhf_jax.tools.plan`.

Compiles the programs of every stage of a recipe for a TPU slice that is not
here, and says whether they fit, what they move, how long they take and what
they cost; `--topology=gpu:h200:8` answers by formula. Needs no weights, rows,
tokenizer or TPU; for slices `pip install -e '.[plan]'`.
"""

import dataclasses
import importlib.util
import json
import math
import os
import signal
import sys
import time

from ma_rlhf_jax import interrupts

if __name__ == '__main__':  # before the imports below, which take seconds
  interrupts.end_on_ctrl_c()

# No device is wanted here, wherever this runs. Read by jax when imported.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import app, flags  # noqa: E402

from ma_rlhf_jax import atomic_file, recipe_flag, validation  # noqa: E402
from ma_rlhf_jax.data import outputs  # noqa: E402
from ma_rlhf_jax.planning import (  # noqa: E402
    abstract,
    compiling,
    plans,
    report,
    roofline,
    search,
)
from ma_rlhf_jax.planning import topology as topology_lib  # noqa: E402
from ma_rlhf_jax.planning.planner import Planner, problems  # noqa: E402
from ma_rlhf_jax.training import automatic  # noqa: E402

_TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'v5e:4x8, v5p:2x2x4, gpu:h200:8, ...'
)
_SEARCH = flags.DEFINE_bool(
    'search', False, 'Find the cheapest set-up that fits.'
)
_FULL = flags.DEFINE_bool(
    'full', False, 'Compile to machine code, which takes ten times as long.'
)
_PRICE = flags.DEFINE_float(
    'price', None, 'Of one chip for one hour.', lower_bound=0
)
_ROWS = flags.DEFINE_integer(
    'rows',
    None,
    'Rows to train on, where the task does not tell.',
    lower_bound=1,
)
_JOBS = flags.DEFINE_integer(
    'jobs', os.cpu_count() or 1, 'Compiling processes at once.', lower_bound=1
)
_SHARES = flags.DEFINE_list(
    'shares',
    [str(share) for share in dataclasses.astuple(roofline.Shares())],
    'Share of the datasheet that is reached: compute, HBM, wire.',
)
_JSON = flags.DEFINE_string('json', None, 'Also write the plan to this file.')

_SECONDS = flags.DEFINE_float(
    'seconds',
    None,
    'To answer in: after the second one no layout is begun that ends later. '
    'Default: 110, with --search 300.',
    lower_bound=1,
)


def _shares() -> roofline.Shares:
  try:
    made = [float(x) for x in _SHARES.value]
  except ValueError:
    made = []
  if len(made) != 3 or not all(0 < x <= 1 for x in made):
    raise ValueError(
        f'--shares={",".join(_SHARES.value)} must be three numbers above 0 and '
        'up to 1: compute, HBM, wire'
    )
  return roofline.Shares(*made)


def _say(text: str) -> None:
  print(f'[{time.strftime("%X")}] {text}', file=sys.stderr, flush=True)


def _check_libtpu(topology: topology_lib.Topology) -> None:
  if topology.platform == 'tpu' and not importlib.util.find_spec('libtpu'):
    raise ValueError(
        f'--topology={topology.name} is compiled by libtpu, which is not '
        "installed; pip install -e '.[plan]' brings the release for this "
        f'jaxlib ({report.versions()["jaxlib"]}; Linux on x86-64, no TPU)'
    )


def _heading(found: plans.Plan) -> str:
  if not found.fits:
    return 'what comes closest'
  if _SEARCH.value:
    return 'the cheapest set-up found'
  return 'a set-up that fits (--search looks for the cheapest)'


def plan() -> plans.Plan:
  """The plan that the flags ask for; prints it on the way."""
  topology = topology_lib.parse(_TOPOLOGY.value or '')
  _check_libtpu(topology)
  for flag in _PRICE, _SECONDS:
    if flag.value is not None and not math.isfinite(flag.value):
      raise ValueError(f'--{flag.name}={flag.value} must be a finite number')
  if _JSON.value:
    outputs.check_place('json', _JSON.value)
  shares, given = _shares(), automatic.fixed(recipe_flag.CONFIG.value)
  validation.validate(given, 1, topology.machine)
  config = abstract.with_preset(given)
  planner = Planner(
      topology,
      shares=shares,
      rows=_ROWS.value,
      jobs=_JOBS.value,
      full=_FULL.value,
      say=_say,
  )
  told = problems(config, topology)
  for line in told:
    print(f'as it is, the recipe cannot run there: {line}')
  begin, as_is = time.monotonic(), None
  if not told:
    as_is = planner.plan(config)
    print(report.text(as_is, shares, _PRICE.value))
    if as_is.fits and not (_SEARCH.value and as_is.counted):
      if _SEARCH.value:
        print('nothing is searched, since seconds cannot be compared')
      return as_is
  seeking = search.Search(planner, config, _say)
  if as_is:
    seeking.learn(as_is)
  spent = time.monotonic() - begin
  found = seeking.run(
      (_SECONDS.value or (300 if _SEARCH.value else 110)) - spent,
      cheapest=_SEARCH.value,
      start=as_is,
      slowest=spent if as_is else 0.0,
  )
  if found is as_is and found.fits:
    print('the cheapest set-up found is the recipe as it is')
  else:
    print(f'{_heading(found)}:\n{report.text(found, shares, _PRICE.value)}')
  print(f'flags: {report.changed(found.config, given) or "none needed"}')
  return found


def main(argv: list[str]) -> None:
  """Prints the plan."""
  # So that children are ended and their files removed then as well.
  signal.signal(signal.SIGTERM, lambda *unused: sys.exit(143))
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected arguments: {argv[1:]}')
    start = time.monotonic()
    found = plan()
    if _JSON.value:
      made = report.as_json(found, recipe_flag.CONFIG.value, _PRICE.value)
      atomic_file.write_text(_JSON.value, json.dumps(made, indent=1))
    _say(f'answered in {time.monotonic() - start:.0f} s')
  except (ValueError, OSError, compiling.CompileError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main, flags_parser=recipe_flag.parse)
