"""What macro actions cost a whole PPO step, beside token PPO.

  python -m tests.benchmarks.macro_step --recipe=hh_2b --set mesh.tensor=1
      [--set ppo.batch_size=16 model.num_layers=4 ...]

One process holds one set of weights. In each round, one rollout is drawn, and
every kind of PPO learns from it, in turns. Medians of wall and of CPU seconds;
a step is the rollout and what is then learned.
"""

import statistics
import time
from typing import Any

import jax

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.benching import workload
from ma_rlhf_jax.parallel.mesh import make_mesh
from ma_rlhf_jax.ppo import step
from ma_rlhf_jax.ppo.programs import Programs
from tests.benchmarks import recipes

# What learns: its name -> words after the recipe's colon.
_KINDS = {
    'token PPO': 'token_ppo',
    'fixed n-grams': '',
    'perplexity': 'termination=ppl',
}


def _clocks(function: Any) -> tuple[tuple[float, float], Any]:
  wall, cpu = time.perf_counter(), time.process_time()
  made = jax.block_until_ready(function())
  return (time.perf_counter() - wall, time.process_time() - cpu), made


def main() -> None:
  """Prints one line a kind."""
  flags = recipes.parser(__doc__).parse_args()
  configs = {name: recipes.read(flags, w) for name, w in _KINDS.items()}
  with jax.set_mesh(make_mesh(configs['token PPO'].mesh)):
    work = workload.make(configs.pop('token PPO'))
    first, states = work.programs, work.states
    kinds = {'token PPO': first}
    for name, config in configs.items():  # all of them train the same states
      spec, _ = workload.make_spec(config)
      models = first.method.configs, first.models(states)
      num_steps = config_lib.num_steps(config.ppo, spec.rows)
      kinds[name] = Programs(spec, *models, num_steps)
    times: dict[str, list[tuple[float, float]]] = {}
    for round_number in range(flags.runs + 1):  # the first compiles
      prompts = work.prompts(round_number)
      taken, rollout = _clocks(
          lambda: step.respond(first, states, prompts, round_number)  # noqa: B023
      )
      times.setdefault('rollout', []).append(taken)
      names = list(kinds)
      turn = round_number % len(names)
      for name in names[turn:] + names[:turn]:
        taken, (states, _) = _clocks(
            lambda: step.learn(  # noqa: B023
                kinds[name], states, prompts, rollout, round_number  # noqa: B023
            )
        )
        times.setdefault(name, []).append(taken)
      print(f'round {round_number}', flush=True)
  device = jax.devices()[0].device_kind
  spec = first.spec
  print(
      f'{flags.recipe} on {jax.device_count()} x {device}, jax '
      f'{jax.__version__}, {spec.rows} x ({spec.prompt_len} + '
      f'{spec.response_len}), medians of {flags.runs} rounds'
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
