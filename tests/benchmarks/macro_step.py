"""What macro actions cost a whole PPO step, beside token PPO.

  python -m tests.benchmarks.macro_step --recipe=hh_2b [--runs=10]
      [--set ppo.batch_size=16 model.num_layers=4 ...]

One process holds one set of weights. In each round, one rollout is drawn, and
every stage learns from it, the stages in turns. Medians of wall and of CPU
seconds; a step is the rollout and what its stage then learns.
"""

import statistics
import time
from typing import Any

import jax

from ma_rlhf_jax.benching import workload
from ma_rlhf_jax.parallel.mesh import make_mesh
from ma_rlhf_jax.ppo.stage import PPO
from tests.benchmarks import recipes

# What learns: its name -> words after the recipe's colon.
_STAGES = {
    'token PPO': 'token_ppo',
    'fixed n-grams': '',
    'perplexity': 'termination=ppl',
}


def _clocks(function: Any) -> tuple[tuple[float, float], Any]:
  wall, cpu = time.perf_counter(), time.process_time()
  made = jax.block_until_ready(function())
  return (time.perf_counter() - wall, time.process_time() - cpu), made


def main() -> None:
  """Prints one line a stage."""
  flags = recipes.parser(__doc__).parse_args()
  configs = {name: recipes.read(flags, w) for name, w in _STAGES.items()}
  with jax.set_mesh(make_mesh(configs['token PPO'].mesh)):
    work = workload.make(configs.pop('token PPO'))
    first, states = work.stage, work.states
    stages = {'token PPO': first}
    for name, config in configs.items():
      run, _ = workload.make_run(config)
      stages[name] = PPO(run, first.shapes, first.params(states))
      stages[name].states = {}  # all of them train the same ones
    times: dict[str, list[tuple[float, float]]] = {}
    for round_number in range(flags.runs + 1):  # the first compiles
      prompts = work.prompts(round_number)
      taken, rollout = _clocks(
          lambda: first.respond(states, prompts, round_number)  # noqa: B023
      )
      times.setdefault('rollout', []).append(taken)
      names = list(stages)
      turn = round_number % len(names)
      for name in names[turn:] + names[:turn]:
        taken, (states, _) = _clocks(
            lambda: stages[name].learn(states, prompts, rollout, round_number)  # noqa: B023
        )
        times.setdefault(name, []).append(taken)
      print(f'round {round_number}', flush=True)
  device = jax.devices()[0].device_kind
  run = first.run
  print(
      f'{flags.recipe} on {jax.device_count()} x {device}, jax '
      f'{jax.__version__}, {run.spec.rows} x ({run.prompt_len} + '
      f'{run.response_len}), medians of {flags.runs} rounds'
  )
  for index, clock in enumerate(('wall', 'CPU')):
    median = {
        name: statistics.median(x[index] for x in found[1:])
        for name, found in times.items()
    }
    rollout_s = median.pop('rollout')
    base = rollout_s + median['token PPO']
    for name, learn_s in median.items():
      step_s = rollout_s + learn_s
      print(
          f'{clock:4} {name:14} step {step_s:8.3f} s  {step_s / base:.3f} of '
          f'token PPO; learning alone {learn_s:8.3f} s  '
          f'{learn_s / median["token PPO"]:.3f}'
      )


if __name__ == '__main__':
  main()
