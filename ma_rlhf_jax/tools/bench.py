"""Measures PPO on the devices at hand: `python -m ma_rlhf_jax.tools.bench`.

  --config=configs/hh_2b.py          the shape and settings of a recipe
  --lengths=full|hh                  every column, or lengths spread like HH's
  --json=FILE                        also write the report
  --compare=ONE.json,TWO.json        two earlier reports side by side

Random weights and prompts; nothing is read or trained to keep. Ceilings (a
large matmul, a copy) are measured first, and shares are shares of them.
"""

import json
import pathlib
import sys
import time

from ma_rlhf_jax import interrupts

if __name__ == '__main__':  # before the imports below, which take seconds
  interrupts.end_on_ctrl_c()

from absl import app, flags
import jax

from ma_rlhf_jax import atomic_file, recipe_flag
from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.benching import measure
from ma_rlhf_jax.data import outputs
from ma_rlhf_jax.parallel import host_memory
from ma_rlhf_jax.parallel.mesh import make_mesh, matmul_precision

_LENGTHS = flags.DEFINE_enum(
    'lengths', 'full', ['full', 'hh'], 'Lengths of prompts and responses.'
)
_RUNS = flags.DEFINE_integer(
    'runs', 3, 'Of each phase, after one that compiles.', lower_bound=1
)
_JSON = flags.DEFINE_string('json', None, 'Also write the report there.')
_COMPARE = flags.DEFINE_list('compare', None, 'Two reports to compare.')


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
  if _COMPARE.value:
    if len(_COMPARE.value) != 2:
      raise ValueError(
          f'--compare={",".join(_COMPARE.value)} must be two files'
      )
    return measure.comparison(*map(_read, _COMPARE.value))
  if _JSON.value:
    outputs.check_place('json', _JSON.value)
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
        config, spread=_LENGTHS.value, runs=_RUNS.value, say=_say
    )
  report['config'] = config_lib.flatten(config)
  if _JSON.value:
    atomic_file.write_text(_JSON.value, json.dumps(report, indent=1))
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
  app.run(main, flags_parser=recipe_flag.parse)
