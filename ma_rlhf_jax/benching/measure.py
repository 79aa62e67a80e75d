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


class _Taken:
  """Seconds of each phase; the first of each, which compiles, stands apart."""

  def __init__(self):
    self.first: dict[str, float] = {}
    self.times: dict[str, list[float]] = {}

  def note(self, name: str, seconds: float) -> None:
    if name in self.first:
      self.times.setdefault(name, []).append(seconds)
    else:
      self.first[name] = seconds


def measure(
    config: ConfigDict, *, spread: str, runs: int, say: Callable[[str], None]
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
  seconds = _Taken()
  for index in range(runs + 1):
    begun = time.perf_counter()
    prompts = work.prompts(index)
    taken, rollout = _seconds(lambda: step.respond(p, states, prompts, index))  # noqa: B023
    seconds.note('rollout', taken)
    taken, (states, _) = _seconds(
        lambda: step.learn(p, states, prompts, rollout, index)  # noqa: B023
    )
    seconds.note('learn', taken)
    seconds.note('iteration', time.perf_counter() - begun)
    say(f'iteration {index}: {time.perf_counter() - begun:.2f} s')
  policy = p.to_decode(p.models(states).policy)
  prefill = _prefill(work, policy, prompts)
  for _ in range(runs + 1):
    seconds.note('prefill', _seconds(prefill)[0])
  del policy
  gc.collect()
  memory = peak_gib()
  for _ in range(runs + 1):
    seconds.note('score', _seconds(lambda: p.score(states, rollout))[0])
  return _report(work, config, top, seconds, memory, spread)


def _phases(
    work: workload.Workload, top: ceilings.Ceilings, median: dict[str, float]
) -> dict[str, dict[str, float]]:
  """Seconds, tokens a second and share of a ceiling, of each phase."""
  prompts, responses = work.prompt_lengths, work.response_lengths
  shape, devices = work.programs.method.configs.policy, jax.device_count()
  passes = lambda head: costs.forward(shape, prompts, responses, head)
  scoring = 2 * passes(True) + 2 * passes(False)
  # Policy and critic forward and backward, the two others forward. Scoring what
  # learns in a pass of its own is more, and counts as lost.
  learning = 4 * passes(True) + 4 * passes(False)
  decode_flops, decode_bytes = costs.decode(shape, prompts, responses)
  decode = max(median['rollout'] - median['prefill'], 1e-9)
  floor = max(decode_bytes / top.memory, decode_flops / top.matmul) / devices
  tokens = int(prompts.sum() + responses.sum())

  def phase(count: float, taken: float, **share: float) -> dict[str, float]:
    return {'seconds': taken, 'tokens_s': count / taken, **share}

  def in_matmuls(flops: float, taken: float) -> dict[str, float]:
    share = flops / taken / top.matmul / devices
    return phase(tokens, taken, share_of_matmul=share)

  return {
      'prefill': phase(float(prompts.sum()), median['prefill']),
      'decode': phase(
          float(responses.sum()), decode, share_of_roofline=floor / decode
      ),
      'score': in_matmuls(scoring, median['score']),
      'learn': in_matmuls(learning, median['learn']),
      'iteration': in_matmuls(learning + decode_flops, median['iteration']),
  }


def _report(
    work: workload.Workload,
    config: ConfigDict,
    top: ceilings.Ceilings,
    taken: _Taken,
    memory: float,
    spread: str,
) -> dict[str, Any]:
  p, spec = work.programs, work.programs.spec
  shape = p.method.configs.policy
  lengths = work.prompt_lengths + work.response_lengths
  tokens = int(lengths.sum())
  computed = buckets.computed_tokens(
      p.split, lengths.tolist(), spec.batch_devices
  )
  median = {name: statistics.median(x) for name, x in taken.times.items()}
  return {
      'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
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
          name: [round(x, 4) for x in xs] for name, xs in taken.times.items()
      },
      'first_seconds': {name: round(x, 2) for name, x in taken.first.items()},
      'phases': _phases(work, top, median),
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
