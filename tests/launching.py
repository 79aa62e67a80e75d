"""Runs launchers, with commands that stand in for those of clusters."""

import os
import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / 'launch'
BASH = shutil.which('bash')
TRAIN = ('--', 'python', '-m', 'ma_rlhf_jax.train', '--config=a b.py')
QUEUED = (
    '--name=my-pod',
    '--zone=us-east5-a',
    '--accelerator_type=v5p-32',
    '--runtime_version=v2-alpha-tpuv5',
)


def launch(
    script: str,
    *arguments: str,
    returncode: int = 0,
    path: pathlib.Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess:
  """Runs a launcher; commands of the folder `path` come first."""
  env = {k: v for k, v in os.environ.items() if not k.startswith('SLURM_')}
  if path is not None:
    env['PATH'] = f'{path}:{env["PATH"]}'
  done = subprocess.run(
      [BASH, str(FOLDER / script), *arguments],
      env=env | environment,
      capture_output=True,
      text=True,
      timeout=60,
  )
  assert done.returncode == returncode, done.stdout + done.stderr
  return done
