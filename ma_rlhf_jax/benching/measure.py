"""Seconds, tokens and memory of the phases of PPO on the devices at hand."""

from collections.abc import Callable
import dataclasses
import gc
import platform
import resource
import statistics
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from ma_rlhf_jax.benching import ceilings, costs, workload
from ma_rlhf_jax.ppo import step
from ma_rlhf_jax.rollout import layout
from ma_rlhf_jax.training import buckets


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
  start = time.perf_counter()
  made = jax.block_until_ready(function())
  return time.perf_counter() - start, made


def peak_gib() -> float:
  """Most memory held so far: of the first device, or of this process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use'] / 2**30
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _prefill(work: workload.Workload, policy: Any, prompts: Any) -> Any:
  """The prompts and one token of each response."""
  spec = work.programs.spec
  settings = dataclasses.replace(spec.sampling(), max_new_tokens=1)
  made = spec.decode_layout(work.programs.method.configs.policy)
  key = spec.key('rollout')
  return lambda: layout.draw(
      policy, prompts, key, 0, layout=made, settings=settings
  )


def measure(
    config: ConfigDict,
    *,
    spread: str,
    runs: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
  """What one shape takes; call it under `jax.set_mesh`.

  Args:
    config: a recipe.
    spread: of lengths, see `workload.lengths`.
    runs: of each phase, after one that compiles.
    say: told before each phase.

  Returns:
    A JSON object: `phases` holds median seconds of `prefill`, `rollout` (with
    the prefill), `score`, `learn` and `iteration` and what follows from them.
  """
  say('ceilings of this device')
  top = ceilings.measure(config.model.dtype)
  say('random weights')
  work = workload.make(config, spread)
  p, states = work.programs, work.states
  times: dict[str, list[float]] = {}
  first: dict[str, float] = {}

  def note(name: str, taken: float) -> None:
    if name in first:
      times.setdefault(name, []).append(taken)
    else:
      first[name] = taken

  for index in range(runs + 1):
    begun = time.perf_counter()
    prompts = work.prompts(index)
    taken, rollout = _seconds(lambda: step.respond(p, states, prompts, index))  # noqa: B023
    note('rollout', taken)
    taken, (states, _) = _seconds(
        lambda: step.learn(p, states, prompts, rollout, index)  # noqa: B023
    )
    note('learn', taken)
    note('iteration', time.perf_counter() - begun)
    say(f'iteration {index}: {time.perf_counter() - begun:.2f} s')
  policy = p.to_decode(p.models(states).policy)
  prefill = _prefill(work, policy, prompts)
  for _ in range(runs + 1):
    note('prefill', _seconds(prefill)[0])
  del policy
  gc.collect()
  memory = peak_gib()
  for _ in range(runs + 1):
    note('score', _seconds(lambda: p.score(states, rollout))[0])
  return _report(work, config, top, times, first, memory, spread)


def _report(
    work: workload.Workload,
    config: ConfigDict,
    top: ceilings.Ceilings,
    times: dict[str, list[float]],
    first: dict[str, float],
    memory: float,
    spread: str,
) -> dict[str, Any]:
  p, devices = work.programs, jax.device_count()
  spec = p.spec
  prompts, responses = work.prompt_lengths, work.response_lengths
  shape = p.method.configs.policy
  passes = lambda head: costs.forward(shape, prompts, responses, head)
  scoring = 2 * passes(True) + 2 * passes(False)
  # Policy and critic forward and backward, the two others forward. Scoring what
  # learns in a pass of its own is more, and counts as lost.
  learning = 4 * passes(True) + 4 * passes(False)
  decode_flops, decode_bytes = costs.decode(shape, prompts, responses)
  median = {name: statistics.median(x) for name, x in times.items()}
  decode = max(median['rollout'] - median['prefill'], 1e-9)
  floor = max(decode_bytes / top.memory, decode_flops / top.matmul) / devices
  share = lambda flops, taken: flops / taken / top.matmul / devices
  tokens = int(prompts.sum() + responses.sum())
  lengths = (prompts + responses).tolist()
  computed = buckets.computed_tokens(p.split, lengths, spec.batch_devices)
  device = jax.devices()[0]
  return {
      'device': f'{devices} x {device.device_kind}',
      'versions': {'jax': jax.__version__, 'python': platform.python_version()},
      'shape': {
          'preset': config.model.preset,
          'parameters': shape.num_params,
          'dtype': config.model.dtype,
          'rows': spec.rows,
          'prompt_columns': spec.prompt_len,
          'response_columns': spec.response_len,
          'lengths': spread,
      },
      'one_pass': list(p.fused_models),
      'ceilings': {
          'matmul_tflops': top.matmul / 1e12,
          'memory_gb_s': top.memory / 1e9,
      },
      'seconds': {
          name: [round(x, 4) for x in xs] for name, xs in times.items()
      },
      'first_seconds': {name: round(x, 2) for name, x in first.items()},
      'phases': {
          'prefill': {
              'seconds': median['prefill'],
              'tokens_s': float(prompts.sum()) / median['prefill'],
          },
          'decode': {
              'seconds': decode,
              'tokens_s': float(responses.sum()) / decode,
              'share_of_roofline': floor / decode,
          },
          'score': {
              'seconds': median['score'],
              'tokens_s': tokens / median['score'],
              'share_of_matmul': share(scoring, median['score']),
          },
          'learn': {
              'seconds': median['learn'],
              'tokens_s': tokens / median['learn'],
              'share_of_matmul': share(learning, median['learn']),
          },
          'iteration': {
              'seconds': median['iteration'],
              'tokens_s': tokens / median['iteration'],
              'share_of_matmul': share(
                  learning + decode_flops, median['iteration']
              ),
          },
      },
      'tokens': {
          'useful': tokens,
          'computed': computed,
          'useful_share': tokens / computed,
      },
      'peak_gib': memory,
  }


def table(report: dict[str, Any]) -> str:
  """A report for people."""
  shape, tokens = report['shape'], report['tokens']
  lines = [
      f'{shape["preset"] or "own shape"} ({shape["parameters"]:,} parameters, '
      f'{shape["dtype"]}), {shape["rows"]} x ({shape["prompt_columns"]} + '
      f'{shape["response_columns"]}) tokens, lengths {shape["lengths"]}',
      f'{report["device"]}, jax {report["versions"]["jax"]}; matmul '
      f'{report["ceilings"]["matmul_tflops"]:.1f} TFLOP/s, copy '
      f'{report["ceilings"]["memory_gb_s"]:.0f} GB/s; '
      + (
          f'{" and ".join(report["one_pass"])} in one pass'
          if report['one_pass']
          else 'scored first'
      ),
      f'{"":10}{"seconds":>10}{"tokens/s":>12}{"of matmul":>11}'
      f'{"of roofline":>13}{"first":>9}',
  ]
  percent = lambda x: '' if x is None else f'{100 * x:.0f} %'
  for name, found in report['phases'].items():
    start = report['first_seconds'].get(name)
    lines.append(
        f'{name:10}{found["seconds"]:10.3f}{found["tokens_s"]:12,.0f}'
        f'{percent(found.get("share_of_matmul")):>11}'
        f'{percent(found.get("share_of_roofline")):>13}'
        f'{"" if start is None else f"{start:.1f}":>9}'
    )
  lines.append(
      f'{tokens["useful"]:,} useful of {tokens["computed"]:,} computed tokens '
      f'({percent(tokens["useful_share"])}); peak {report["peak_gib"]:.2f} GiB'
  )
  return '\n'.join(lines)


def comparison(one: dict[str, Any], two: dict[str, Any]) -> str:
  """Phase by phase, how the second report stands to the first."""
  lines = [f'{"":10}{"first":>10}{"second":>10}{"ratio":>8}']
  for name, found in one['phases'].items():
    a, b = found['seconds'], two['phases'][name]['seconds']
    lines.append(f'{name:10}{a:10.3f}{b:10.3f}{b / a:8.2f}')
  a, b = one['peak_gib'], two['peak_gib']
  lines.append(f'{"peak GiB":10}{a:10.2f}{b:10.2f}{b / a:8.2f}')
  apart = [
      f'{field}: {one[field]} and {two[field]}'
      for field in ('device', 'shape', 'versions')
      if one[field] != two[field]
  ]
  configs = [report.get('config', {}) for report in (one, two)]
  for field in sorted(set().union(*configs)):
    a, b = (config.get(field) for config in configs)
    if a != b:
      apart.append(f'{field}: {a} and {b}')
  return '\n'.join([*lines, *apart])
