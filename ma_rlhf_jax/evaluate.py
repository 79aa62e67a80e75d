"""Compares policies on held-out prompts.

`python -m ma_rlhf_jax.evaluate --workdir=DIR` compares the SFT policy of a
finished run with its MA-PPO policy. `train` ends with the same comparison.
"""

from collections.abc import Callable
import json
import sys

from absl import app, flags
import jax
import numpy as np

from ma_rlhf_jax import cluster_flags
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.parallel import processes
from ma_rlhf_jax.training import judge, origins, sources
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.start import load_run

_Z = 1.959964  # 97.5 % quantile of the normal distribution


def interval(x_N: np.ndarray) -> tuple[float, float, float]:
  """(mean, low, high): the mean and its normal 95 % interval."""
  mean = float(np.mean(x_N))
  half = _Z * float(np.std(x_N, ddof=1)) / np.sqrt(len(x_N))
  return mean, mean - half, mean + half


def share_interval(x_N: np.ndarray) -> tuple[float, float, float]:
  """`interval` of a share, cut to [0, 1]."""
  mean, low, high = interval(x_N)
  return mean, max(0.0, low), min(1.0, high)


def wins(ours_N: np.ndarray, theirs_N: np.ndarray) -> np.ndarray:
  """1 where ours is larger, 0 where theirs is, 0.5 on a tie."""
  return 0.5 + 0.5 * np.sign(ours_N - theirs_N)


def _interval_of(name: str) -> Callable[[np.ndarray], tuple]:
  return share_interval if name == 'ended' else interval


def summarise(sft: judge.Judged, ppo: judge.Judged) -> dict[str, dict]:
  """Means, intervals and paired differences of every number.

  Returns:
    name -> {'sft': (mean, low, high), 'ppo': ..., 'difference': ...} for every
    number of both, and 'win rate by <judge>' -> {'ppo': ...}. Differences are
    paired by prompt.
  """
  rows = {
      name: {
          'sft': _interval_of(name)(sft.numbers[name]),
          'ppo': _interval_of(name)(ppo.numbers[name]),
          'difference': interval(ppo.numbers[name] - sft.numbers[name]),
      }
      for name in ppo.numbers
  }
  judged_by = 'gold' if 'gold' in ppo.numbers else 'score'
  won = wins(ppo.numbers[judged_by], sft.numbers[judged_by])
  rows[f'win rate by {judged_by}'] = {'ppo': share_interval(won)}
  return rows


_UNITS = {
    'score': 'reward-model units',
    'gold': 'true quality, -1 to 1',
    'length': 'tokens',
    'kl': 'nats per response, from SFT',
    'ended': 'share that ended with EOS',
}


def describe(
    rows: dict[str, dict], num_prompts: int, trained: str = 'MA-PPO'
) -> str:
  """The table of `summarise` as text; `trained` heads the second column."""
  cell = lambda x: '' if x is None else '{:.3f} [{:.3f}, {:.3f}]'.format(*x)
  titles = ('', 'SFT', trained, 'difference', '')
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


def compare(run: Run) -> None:
  """Compares SFT with MA-PPO, prints the table and keeps it in `evaluate/`."""
  c = run.config
  origins.check(run, 'ppo')  # a workdir that is named may have trained on
  policy = sources.policy_source(c, run.workdir)
  trained = sources.Source('', sources.product(run.workdir, 'ppo'))
  load = lambda source, kind: judge.Model(*sources.load(run, source, kind))
  sft = load(policy, 'policy')
  scorer = load(sources.reward_model_source(c, run.workdir), 'scalar')
  judged = {
      name: judge.judge(
          run,
          model,
          num_prompts=c.evaluate.prompts,
          stream=f'compare_{name}',
          temperature=c.evaluate.temperature,
          ref_policy=sft,
          reward_model=scorer,
      )
      for name, model in (('sft', sft), ('ppo', load(trained, 'policy')))
  }
  rows = summarise(judged['sft'], judged['ppo'])
  count = len(judged['ppo'].prompts)
  if count < c.evaluate.prompts:
    print(f'only {count} of the {c.evaluate.prompts} wanted are held out')
  plain = c.macro.termination == 'fixed' and c.macro.ngram == 1
  print(describe(rows, count, 'PPO' if plain else 'MA-PPO'), flush=True)
  folder = run.workdir / 'evaluate'
  with processes.together():
    if processes.is_first():
      folder.mkdir(parents=True, exist_ok=True)
      text = json.dumps(rows, indent=2) + '\n'
      (folder / 'comparison.json').write_text(text)
  workdir_lib.mark_done(run.workdir, 'evaluate', {'comparison': rows})


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
    with processes.ending_together():
      run = processes.first_then_rest(lambda: load_run(config, folder))
      for line in sources.describe(config):
        print(line)
      with jax.set_mesh(run.mesh):
        compare(run)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'A workdir in which PPO is done.')
  flags.DEFINE_integer('prompts', 0, 'Held-out prompts; 0 = evaluate.prompts.')
  app.run(main)
