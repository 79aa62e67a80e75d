"""Measures PPO on the devices at hand.

Weights and prompts are random; nothing is read, and nothing trained is kept.
Ceilings (a large matmul, a copy) are measured first, and shares are shares of
them.

Exit codes: 0 done; 1 an error; 130 Ctrl-C.
"""

import json
import pathlib
import sys
import time

from ma_rlhf_jax import interrupts
from ma_rlhf_jax.commands import command, tools

if __name__ == '__main__':  # before the imports below, which take seconds
  interrupts.end_on_ctrl_c()
  command.answer(tools.BENCH)

from absl import app, flags
import jax

from ma_rlhf_jax import atomic_file, recipe_flag
from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.benching import measure
from ma_rlhf_jax.commands import absl_flags
from ma_rlhf_jax.data import outputs
from ma_rlhf_jax.parallel import host_memory
from ma_rlhf_jax.parallel.mesh import make_mesh, matmul_precision


def _say(text: str) -> None:
  print(f'[{time.strftime("%X")}] {text}', file=sys.stderr, flush=True)


def _read(path: str) -> dict:
  if not pathlib.Path(path).is_file():
    raise ValueError(
        f'--compare: there is no file {path}; make one with --json={path}'
    )
  try:
    found = json.loads(pathlib.Path(path).read_text())
    found['phases'], found['peak_gib']
    return found
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
        f'--compare: {path} is no report of this tool ({error}); --json=FILE '
        'makes one'
    ) from None


def bench() -> str:
  """What the flags ask for, as text."""
  if flags.FLAGS.compare:
    if len(flags.FLAGS.compare) != 2:
      raise ValueError(
          f'--compare={",".join(flags.FLAGS.compare)} must be two files'
      )
    return measure.comparison(*map(_read, flags.FLAGS.compare))
  if flags.FLAGS.json:
    outputs.check_place('json', flags.FLAGS.json)
  host_memory.keep_freed()  # as `train` does
  config = recipe_flag.CONFIG.value
  name = config.sft.init.rpartition('/')[2]
  if config.sft.init and not config.model.preset:
    raise ValueError(
        f'sft.init={name!r} is not opened; name its shape by '
        '--config.model.preset'
    )
  precision = matmul_precision(config.model.matmul_precision)
  with jax.set_mesh(make_mesh(config.mesh)), precision:
    report = measure.measure(
        config, spread=flags.FLAGS.lengths, runs=flags.FLAGS.runs, say=_say
    )
  report['config'] = config_lib.flatten(config)
  if flags.FLAGS.json:
    atomic_file.write_text(flags.FLAGS.json, json.dumps(report, indent=1))
  return measure.table(report)


def main(argv: list[str]) -> None:
  """Prints the table."""
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected arguments: {argv[1:]}')
    print(bench())
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  absl_flags.define(tools.BENCH.flags)
  app.run(main, flags_parser=recipe_flag.parse)
