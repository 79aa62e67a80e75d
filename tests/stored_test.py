"""A workdir that an earlier version of the package left half done goes on.

`stored/cf5e105.tar.xz` was written by the commit of that name: SFT and reward
model are done, PPO was killed after 4 of 12 updates. `want.safetensors` in it
is the policy with which that commit ended the run.
"""

import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from safetensors import numpy as safetensors

_HERE = pathlib.Path(__file__).parent / 'stored'


@pytest.mark.slow
def test_a_stored_workdir_ends_as_its_own_version_ended_it(
    tmp_path: pathlib.Path,
) -> None:
  with tarfile.open(_HERE / 'cf5e105.tar.xz') as archive:
    archive.extractall(tmp_path, filter='data')
  workdir = tmp_path / 'cf5e105'
  load = lambda path: safetensors.load_file(workdir / path)
  want, start = load('want.safetensors'), load('sft/hf/model.safetensors')
  command = [sys.executable, '-m', 'ma_rlhf_jax.train']
  command += [f'--config={_HERE / "recipe.py"}', f'--workdir={workdir}']
  done = subprocess.run(command, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  assert 'sft: done before' in done.stdout
  assert 'ppo 12/12' in done.stdout + done.stderr
  found = load('ppo/hf/model.safetensors')
  assert found.keys() == want.keys()
  apart = max(np.abs(found[name] - want[name]).max() for name in want)
  moved = max(np.abs(want[name] - start[name]).max() for name in want)
  # Adam's first steps are signs: on other processors a few may differ.
  assert moved > 1e-5 and apart < 0.1 * moved
