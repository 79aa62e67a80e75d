"""Compares SFT and PPO policies of a run on held-out prompts.

`train` ends with the same comparison. The table is printed and kept in the
folder `evaluate` of the run.

Exit codes: 0 done; 1 an error; 75 a peer process was lost; 130 Ctrl-C.
"""

import contextlib
import functools
import sys

from ma_rlhf_jax import interrupts
from ma_rlhf_jax.commands import command, verbs

if __name__ == '__main__':  # before the imports below, which take seconds
  interrupts.end_on_ctrl_c()
  command.answer(verbs.EVALUATE)

from absl import app, flags
import jax
import numpy as np

from ma_rlhf_jax import cluster_flags, workdir_lock
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.commands import absl_flags
from ma_rlhf_jax.evaluation import comparison, statistics
from ma_rlhf_jax.parallel import processes
from ma_rlhf_jax.parallel.mesh import matmul_precision
from ma_rlhf_jax.scorers import functions
from ma_rlhf_jax.training import (
    judge,
    loading,
    origins,
    products,
    sources,
    symptoms,
)
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.start import load_run


def wins(ours_N: np.ndarray, theirs_N: np.ndarray) -> np.ndarray:
  """1 where ours is larger, 0 where theirs is, 0.5 on a tie."""
  return 0.5 + 0.5 * np.sign(ours_N - theirs_N)


def summarise(sft: judge.Judged, ppo: judge.Judged) -> dict[str, dict]:
  """Means, intervals and paired differences of every number.

  Returns:
    name -> {'sft': (mean, low, high), 'ppo': ..., 'difference': ...} for every
    number of both, and 'win rate by <judge>' -> {'ppo': ...}. Differences are
    paired by prompt.
  """
  rows = {
      name: _summary(name, sft.numbers[name], ppo.numbers[name])
      for name in ppo.numbers
  }
  judged_by = 'gold' if 'gold' in ppo.numbers else 'score'
  won = wins(ppo.numbers[judged_by], sft.numbers[judged_by])
  rows[f'win rate by {judged_by}'] = {'ppo': statistics.bounded_interval(won)}
  return rows


def _summary(
    name: str, sft_N: np.ndarray, ppo_N: np.ndarray
) -> dict[str, statistics.Interval]:
  """The row of one number; shares lie in [0, 1], others have no bounds."""
  of_mean = of_difference = statistics.mean_interval
  if name in ('ended', 'repeated'):
    of_mean = statistics.bounded_interval
    of_difference = functools.partial(of_mean, low=-1.0, high=1.0)
  return {
      'sft': of_mean(sft_N),
      'ppo': of_mean(ppo_N),
      'difference': of_difference(ppo_N - sft_N),
  }


_UNITS = {
    'score': 'reward-model units',
    'gold': 'true quality, -1 to 1',
    'length': 'tokens',
    'kl': 'nats per response, from the start of PPO',
    'policy_kl': 'the same at temperature 1, without filters',
    'ended': 'share that ended with EOS',
    'repeated': 'share of a response that is its most frequent token',
}


def describe(
    rows: dict[str, dict],
    num_prompts: int,
    trained: str = 'MA-PPO',
    start: str = 'SFT',
) -> str:
  """The table of `summarise` as text.

  Args:
    rows: what `summarise` returns.
    num_prompts: that both policies answered.
    trained: heads the column of the trained policy.
    start: heads that of the policy that PPO began with.
  """
  cell = lambda x: '' if x is None else '{:.3f} [{:.3f}, {:.3f}]'.format(*x)
  titles = ('', start, trained, 'difference', '')
  lines = [titles] + [
      (
          name,
          cell(row.get('sft')),
          cell(row.get('ppo')),
          cell(row.get('difference')),
          _UNITS.get(name, ''),
      )
      for name, row in rows.items()
  ]
  widths = [max(len(line[i]) for line in lines) for i in range(5)]
  body = '\n'.join(
      '  '.join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
      for line in lines
  )
  return (
      f'{num_prompts} held-out prompts, mean [95 % interval], differences '
      f'paired by prompt\n{body}'
  )


def _symptoms(run: Run, rows: dict[str, dict]) -> dict[str, str]:
  """What the stages and the comparison show, code -> evidence."""
  found: dict[str, str] = {}
  made = [(run.workdir, stage) for stage in ('sft', 'reward_model', 'ppo')]
  # And those of another run that this one took its models from.
  taken = (sources.named_source(run.config, use) for use in ('ppo', 'score'))
  made += [(source.workdir, source.stage) for source in taken if source]
  for workdir, stage in made:
    done = workdir_lib.read_done(workdir, stage) if stage else None
    found |= (done or {}).get('symptoms', {})
  found |= symptoms.of_comparison(rows, run.config)
  return {code: found[code] for code in symptoms.CODES if code in found}


def compare(run: Run) -> None:
  """Compares SFT with MA-PPO, prints the table and keeps it in `evaluate/`.

  See `evaluation.comparison` for the files.
  """
  c = run.config
  origins.check(run, 'ppo')  # a workdir that is named may have trained on
  for stage in ('sft', 'reward_model', 'ppo'):
    products.check_unchanged(run.workdir, stage)
  policy = sources.source(c, run.workdir, 'ppo')
  trained = products.Source('', products.product(run.workdir, 'ppo'))
  load = lambda source, kind: judge.Model(*loading.load(run, source, kind))
  sft = load(policy, 'policy')
  scorer = None
  if functions.has_model(c):
    scorer = load(sources.source(c, run.workdir, 'score'), 'scalar')
  judged = {
      name: judge.judge(
          run,
          model,
          num_prompts=c.evaluate.prompts,
          stream=f'compare_{name}',
          temperature=c.evaluate.temperature,
          data=run.data.comparison,
          ref_policy=sft,
          reward_model=scorer,
      )
      for name, model in (('sft', sft), ('ppo', load(trained, 'policy')))
  }
  rows = summarise(judged['sft'], judged['ppo'])
  count = len(judged['ppo'].prompts)
  if count < c.evaluate.prompts:
    print(
        f'only {count} of the evaluate.prompts={c.evaluate.prompts} wanted are '
        'held out for the comparison'
    )
  plain = c.macro.termination == 'fixed' and c.macro.ngram == 1
  found = _symptoms(run, rows)
  print(symptoms.verdict(found))
  start = 'SFT' if policy.stage in ('', 'sft') else f'start ({policy.stage})'
  print(describe(rows, count, 'PPO' if plain else 'MA-PPO', start), flush=True)
  made = comparison.Comparison(rows, count, comparison.settings(c))
  path = comparison.write(run.workdir, made, list(found))
  if path.name != comparison.OWN:
    print(f'in {path}, beside the result of the run with its own settings')


def main(argv: list[str]) -> None:
  """Compares the policies of the workdir that the flags name."""
  workdir, prompts = flags.FLAGS.workdir, flags.FLAGS.prompts
  try:
    cluster_flags.initialize()
    if len(argv) > 1 or not workdir:
      raise ValueError('usage: python -m ma_rlhf_jax.evaluate --workdir=DIR')
    folder, config = workdir_lib.read_config(workdir)
    if workdir_lib.read_done(folder, 'ppo') is None:
      raise ValueError(f'{folder}: PPO is not done; train it to its end first')
    if prompts == 1 or prompts < 0:
      raise ValueError(f'--prompts={prompts}: an interval needs at least 2')
    if prompts:
      config.evaluate.prompts = prompts
    with processes.ending_together(), contextlib.ExitStack() as stack:
      with processes.together():
        if processes.is_first():
          stack.enter_context(workdir_lock.hold(folder))
      run = processes.first_then_rest(lambda: load_run(config, folder))
      for line in sources.describe(config):
        print(line)
      precision = matmul_precision(config.model.matmul_precision)
      with jax.set_mesh(run.mesh), precision:
        compare(run)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  absl_flags.define(verbs.EVALUATE.flags)
  app.run(main, flags_parser=absl_flags.parse)
