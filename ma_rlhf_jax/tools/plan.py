"""Plans a run: whether it fits a machine, its time and its cost.

Compiles the programs of every stage of a recipe for a TPU slice that is not
here; GPUs are answered by formula. Needs no weights, rows, tokenizer or TPU;
for slices `pip install -e '.[plan]'`.

Where the recipe does not fit as it is, other settings are tried, and those that
fit are printed as flags. The plan goes to the standard output, progress to the
standard error.

Exit codes:
  0    The plan fits the machine.
  1    An error: a wrong flag, or a program that cannot be compiled.
  3    Nothing that was tried fits; what comes closest is printed.
  130  Interrupted by Ctrl-C (143: by SIGTERM).
"""

import importlib.util
import json
import math
import os
import signal
import sys
import time

from ma_rlhf_jax import interrupts
from ma_rlhf_jax.commands import command, tools

if __name__ == '__main__':  # before the imports below, which take seconds
  interrupts.end_on_ctrl_c()
  command.answer(tools.PLAN)

# No device is wanted here, wherever this runs. Read by jax when imported.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import app, flags  # noqa: E402

from ma_rlhf_jax import atomic_file, recipe_flag, validation  # noqa: E402
from ma_rlhf_jax.commands import absl_flags  # noqa: E402
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

# The exit code where no layout fits.
NOTHING_FITS = 3


def _shares() -> roofline.Shares:
  try:
    made = [float(x) for x in flags.FLAGS.shares]
  except ValueError:
    made = []
  if len(made) != 3 or not all(0 < x <= 1 for x in made):
    raise ValueError(
        f'--shares={",".join(flags.FLAGS.shares)} must be three numbers above '
        '0 and up to 1: compute, HBM, wire'
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
  if flags.FLAGS.search:
    return 'the cheapest set-up found'
  return 'a set-up that fits (--search looks for the cheapest)'


def _check_flags() -> None:
  for name in 'price', 'seconds':
    value = flags.FLAGS[name].value
    if value is not None and not math.isfinite(value):
      raise ValueError(f'--{name}={value} must be a finite number')
  if flags.FLAGS.json:
    outputs.check_place('json', flags.FLAGS.json)


def plan() -> plans.Plan:
  """The plan that the flags ask for; prints it on the way."""
  topology = topology_lib.parse(flags.FLAGS.topology or '')
  _check_libtpu(topology)
  _check_flags()
  shares, given = _shares(), automatic.fixed(recipe_flag.CONFIG.value)
  validation.refuse(validation.problems(given, 1, topology.machine))
  config = abstract.with_preset(given)
  planner = Planner(
      topology,
      shares=shares,
      rows=flags.FLAGS.rows,
      jobs=flags.FLAGS.jobs,
      full=flags.FLAGS.full,
      say=_say,
  )
  told = problems(config, topology)
  for line in told:
    print(f'as it is, the recipe cannot run there: {line}')
  begin, as_is = time.monotonic(), None
  if not told:
    as_is = planner.plan(config)
    print(report.text(as_is, shares, flags.FLAGS.price))
    if as_is.fits and not (flags.FLAGS.search and as_is.counted):
      if flags.FLAGS.search:
        print('nothing is searched, since seconds cannot be compared')
      return as_is
  seeking = search.Search(planner, config, _say)
  if as_is:
    seeking.learn(as_is)
  spent = time.monotonic() - begin
  found = seeking.run(
      (flags.FLAGS.seconds or (300 if flags.FLAGS.search else 110)) - spent,
      cheapest=flags.FLAGS.search,
      start=as_is,
      slowest=spent if as_is else 0.0,
  )
  if found is as_is and found.fits:
    print('the cheapest set-up found is the recipe as it is')
  else:
    print(
        f'{_heading(found)}:\n{report.text(found, shares, flags.FLAGS.price)}'
    )
  print(f'flags: {report.changed(found.config, given) or "none needed"}')
  return found


def main(argv: list[str]) -> None:
  """Prints the plan; SystemExit holds the exit code where it does not fit."""
  # So that children are ended and their files removed then as well.
  signal.signal(signal.SIGTERM, lambda *unused: sys.exit(143))
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected arguments: {argv[1:]}')
    start = time.monotonic()
    found = plan()
    if flags.FLAGS.json:
      made = report.as_json(found, recipe_flag.CONFIG.value, flags.FLAGS.price)
      atomic_file.write_text(flags.FLAGS.json, json.dumps(made, indent=1))
    _say(f'answered in {time.monotonic() - start:.0f} s')
  except (ValueError, OSError, compiling.CompileError) as error:
    sys.exit(f'error: {error}')
  if not found.fits:
    sys.exit(NOTHING_FITS)


if __name__ == '__main__':
  absl_flags.define(tools.PLAN.flags)
  app.run(main, flags_parser=recipe_flag.parse)
