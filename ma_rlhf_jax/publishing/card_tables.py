"""The tables of a model card: settings, metrics and the check of the export."""

from collections.abc import Iterator, Sequence
import re
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.evaluation import comparison
from ma_rlhf_jax.training import metrics as metrics_lib
from ma_rlhf_jax.training import symptoms

_SHARED = ('seed', 'data.task', 'model.dtype', 'model.param_dtype')
_LORA = ('lora.rank', 'lora.alpha', 'lora.targets')
_PPO = (
    'macro.variant',
    'macro.termination',
    'macro.ngram',
    'macro.reward',
    'macro.value',
    'ppo.batch_size',
    'ppo.ppo_epochs',
    'ppo.minibatches',
    'ppo.kl_coef',
    'ppo.clip_eps',
    'ppo.gamma',
    'ppo.gae_lambda',
    'ppo.optim.lr',
    'critic.optim.lr',
    'rollout.temperature',
    'rollout.top_k',
    'rollout.top_p',
)
_FIELDS = {
    'sft': ('sft.batch_size', 'sft.loss_on', 'sft.optim.lr'),
    'reward_model': (
        'reward_model.batch_size',
        'reward_model.loss',
        'reward_model.optim.lr',
    ),
    'ppo': _PPO,
    'critic': _PPO,
}


def plain(value: Any) -> str:
  """One line in which no character is Markdown, HTML or the end of a cell.

  Floats have six digits.
  """
  value = f'{value:.6g}' if isinstance(value, float) else value
  line = ' '.join(str(value).split())
  line = ''.join(c if c.isprintable() else '?' for c in line)
  return re.sub(r'([\\`*_{}\[\]<>|~&$@])', r'\\\1', line)


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A Markdown table; every cell is made `plain`."""
  line = lambda cells: '| ' + ' | '.join(plain(x) for x in cells) + ' |'
  return '\n'.join(
      [line(titles), line(['---'] * len(titles)), *map(line, rows)]
  )


def settings(config: ConfigDict, stage: str) -> str:
  """The fields that matter for a stage, and the hash of all of them."""
  names = [*_SHARED, *_FIELDS[stage]]
  names += _LORA if config.lora.rank else ()
  if config.macro.termination != 'fixed' and 'macro.ngram' in names:
    names.remove('macro.ngram')
  flat = config_lib.flatten(config)
  rows = [(name, flat[name]) for name in names]
  digest = ('SHA-256 of all fields', config_lib.fingerprint(config))
  return table(('field', 'value'), [*rows, digest])


def metrics(
    config: ConfigDict, workdir: epath.Path, stage: str
) -> Iterator[str]:
  """The final comparison where there is one, and the last evaluation.

  Args:
    config: of the run.
    workdir: of the run.
    stage: 'sft', 'reward_model', 'ppo' or 'critic'.

  Yields:
    Sections of Markdown; none where nothing was measured.
  """
  for found in comparison.read(workdir) if stage == 'ppo' else ():
    yield (
        f'{_prompts(found)}, mean and 95 % interval, differences paired by '
        'prompt:'
    )
    yield _comparison(found.rows)
  trainer = 'ppo' if stage == 'critic' else stage
  done = workdir_lib.read_done(workdir, trainer) or {}
  if found := done.get('symptoms'):
    yield 'Symptoms of a failed run when training ended:'
    yield '\n'.join(f'* {plain(line)}' for line in symptoms.lines(found))
  names = ('value', 'return', 'explained_variance', 'bias')
  shown = [f'critic/{name}' for name in names]
  wanted = lambda name: (
      name in shown if stage == 'critic' else name.startswith('eval/')
  )
  for row in reversed(metrics_lib.read_metrics(workdir / trainer)):
    values = [(k, f'{v:.4g}') for k, v in row.items() if wanted(k)]
    if values:
      yield f'After update {row["step"]}{_evaluated_on(config, stage)}:'
      yield table(('metric', 'value'), values)
      return


def _prompts(found: comparison.Comparison) -> str:
  """On how many prompts a comparison was made, and with which settings."""
  number = 'an unrecorded number of' if found.prompts is None else found.prompts
  with_ = ', '.join(
      f'{plain(k)} = {plain(v)}' for k, v in found.settings.items()
  )
  return f'On {number} held-out prompts' + (f' ({with_})' if with_ else '')


def _evaluated_on(config: ConfigDict, stage: str) -> str:
  """How many rows the evaluations of a stage read; '' where they read none."""
  if stage == 'critic':  # measured while it trained
    return ''
  most = config.data.eval_rows
  if stage == 'ppo':
    return f', on at most {min(most, config.ppo.batch_size)} held-out prompts'
  return f', on at most {most} held-out rows'


def _comparison(rows: dict[str, dict[str, Sequence[float]]]) -> str:
  cell = lambda x: '{:.3f} ({:.3f} to {:.3f})'.format(*x) if x else ''
  columns = ('sft', 'ppo', 'difference')
  return table(
      ('', 'SFT', 'this model', 'difference'),
      [
          (name, *(cell(row.get(column)) for column in columns))
          for name, row in rows.items()
      ],
  )


def check(receipt: dict[str, Any]) -> str:
  """Who read the written files, and how far what came out is from the source.

  Args:
    receipt: of an export, see `export`.
  """
  readers = {name: found for name, found in receipt['readers'].items() if found}
  titles = next(iter(readers.values()))
  return table(
      ('read by', *(title.replace('_', ' ') for title in titles)),
      [
          (name, *(f'{value:.3g}' for value in found.values()))
          for name, found in readers.items()
      ],
  )
