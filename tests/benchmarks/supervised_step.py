"""Seconds and model-FLOP utilisation of updates of SFT and reward model.

  python -m tests.benchmarks.supervised_step --recipe=hh_2b --set mesh.tensor=1
      [--set sft.batch_size=64 sft.micro_batch_size=16 ...]

Random weights and rows of full length; the share is of a matrix product that is
measured first. SFT learns the whole text, as `sft.loss_on='text'` says.
"""

import statistics
import time
import types

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax.benching import ceilings, costs, workload
from ma_rlhf_jax.data.encoding import EncodedSet, Ragged
from ma_rlhf_jax.data.parts import Datasets
from ma_rlhf_jax.models import heads
from ma_rlhf_jax.parallel.mesh import make_mesh
from ma_rlhf_jax.training import model_configs
from ma_rlhf_jax.training.reward_model import RewardModel
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.sft import SFT
from tests.benchmarks import recipes

# Stage -> class, kind of its model, sequences of a row, whether tokens reach
# the vocabulary.
_STAGES = {
    'sft': (SFT, 'policy', 1, True),
    'reward_model': (RewardModel, 'scalar', 2, False),
}


def _rows(count: int, prompt: int, response: int, vocab: int) -> EncodedSet:
  random = np.random.default_rng(0)
  texts = lambda width: Ragged.of(
      random.integers(3, vocab, (count, width)).tolist()
  )
  whole = np.zeros(count, bool)
  return EncodedSet(
      texts(prompt), texts(response), texts(response), whole, whole
  )


def _seconds(config: ConfigDict, name: str, runs: int) -> tuple[float, float]:
  """Median seconds of an update and the FLOPs that it needs."""
  make, kind, sequences, head = _STAGES[name]
  spec, shape = workload.make_spec(config)
  config = spec.config  # without `auto`
  shape = model_configs.trained(shape, config)
  size = config[name].batch_size
  width = spec.prompt_len, spec.response_len
  data = _rows(size, *width, shape.vocab_size)
  run = Run(
      config=config,
      workdir=epath.Path('unused'),
      mesh=spec.mesh,
      tokenizer=types.SimpleNamespace(
          pad_token_id=spec.pad_id, eos_token_id=spec.eos_id
      ),
      data=Datasets(data, data, data, data, counts={}),
      prompt_len=spec.prompt_len,
      response_len=spec.response_len,
      gold=None,
  )
  params = heads.init_params(kind, shape, jax.random.key(0))
  stage = make(run, shape, params)
  del params
  states, stage.states = stage.states, {}
  times = []
  for index in range(runs + 1):  # the first compiles
    start = time.perf_counter()
    states, metrics = stage.step(states, index)
    jax.block_until_ready((states, metrics))
    times.append(time.perf_counter() - start)
  # Every token is one of the response as far as the head is concerned.
  none, all_of_it = np.zeros(size, int), np.full(size, sum(width))
  flops = 3 * sequences * costs.forward(shape, none, all_of_it, head)
  return statistics.median(times[1:]), flops


def main() -> None:
  """Prints one line a stage."""
  flags = recipes.parser(__doc__).parse_args()
  config = recipes.read(flags)
  config.sft.loss_on = 'text'
  with jax.set_mesh(make_mesh(config.mesh)):
    top = ceilings.measure(config.model.dtype)
    for name in _STAGES:
      seconds, flops = _seconds(config, name, flags.runs)
      rate = flops / seconds / jax.device_count()
      print(
          f'{name:14} {config[name].batch_size} rows {seconds:.3f} s  '
          f'{rate / 1e12:.1f} TFLOP/s a device, {rate / top.matmul:.1%} of '
          f'{top.matmul / 1e12:.1f}',
          flush=True,
      )


if __name__ == '__main__':
  main()
