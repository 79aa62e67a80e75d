"""Shows one row of each stage, column by column.

For each stage of a run, one real row as its arrays are: ids, masks, positions,
padding, which tokens are trained on, where macro actions start, where the score
is read and where the reward lands. Trained tokens come from the loss of the
stage, rewards from the function that makes them. No model is loaded and nothing
is trained.

Exit codes: 0 done; 1 an error; 130 Ctrl-C.
"""

from collections.abc import Sequence
import dataclasses
import sys

from ma_rlhf_jax import interrupts
from ma_rlhf_jax.commands import command, tools

if __name__ == '__main__':  # before the imports below, which take seconds
  interrupts.end_on_ctrl_c()
  command.answer(tools.LAYOUT)

from absl import app, flags
from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import masking, recipe_flag, validation
from ma_rlhf_jax.commands import absl_flags
from ma_rlhf_jax.data import batches
from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.objective import preference, rewards
from ma_rlhf_jax.structs import MacroActions, SequenceBatch
from ma_rlhf_jax.training import checkpoint, sft
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.start import load_run

# Padding is told in one line from so many columns on.
_RUN = 4


@dataclasses.dataclass(frozen=True)
class Table:
  """One row of a batch, a line a column of the array.

  Attributes:
    title: what is shown.
    tokens_L: int, token ids.
    mask_L: bool, true on real tokens.
    columns: heading -> one text a column of the array.
    notes: lines below the table.
  """

  title: str
  tokens_L: np.ndarray
  mask_L: np.ndarray
  columns: dict[str, Sequence[str]]
  notes: Sequence[str]


def _first(tree: SequenceBatch) -> SequenceBatch:
  """The first row, still as a batch, on the host."""
  return jax.tree.map(lambda x: np.asarray(x)[:1], tree)


def _marks(flags_L: np.ndarray, mark: str) -> list[str]:
  return [mark if flag else '' for flag in np.asarray(flags_L)]


def _table(
    run: Run,
    title: str,
    rows: SequenceBatch,
    columns: dict[str, Sequence[str]],
    notes: Sequence[str],
) -> Table:
  """A table of a batch of one row, with what is said of every stage."""
  tokens_L, mask_L = rows.tokens_BL[0], rows.mask_BL[0]
  width = len(tokens_L) - rows.response_mask_BT.shape[1]
  ids = run.tokenizer.bos_token_id, run.tokenizer.eos_token_id
  bos, eos = (np.flatnonzero((tokens_L == i) & mask_L).tolist() for i in ids)
  pads = lambda part: int((~mask_L[part]).sum())
  facts = [
      f'{width} prompt columns, padded on the left by {pads(slice(width))}; '
      f'{len(tokens_L) - width} response columns, padded on the right by '
      f'{pads(slice(width, None))}',
      f'BOS {len(bos)} time(s), in column {bos}; EOS {len(eos)} time(s), in '
      f'column {eos}' + ('' if eos else ' (the response was cut)'),
  ]
  return Table(title, tokens_L, mask_L, columns, [*facts, *notes])


def _positions(rows: SequenceBatch) -> list[str]:
  return [str(p) for p in np.asarray(masking.positions(rows.mask_BL))[0]]


def _batch(run: Run, make: object, stage: str, row: int) -> object:
  """Row `row` of the part of a stage, as the stage's batches hold it."""
  data = getattr(run.data, stage)
  if row >= len(data):
    raise ValueError(
        f'--row={row}: the {stage} part has {len(data)} rows, the last one is '
        f'{len(data) - 1}'
    )
  return make(
      data,
      [row],
      prompt_len=run.prompt_len,
      response_len=run.response_len,
      pad_id=run.tokenizer.pad_token_id,
  )


def sft_table(run: Run, row: int) -> Table:
  """What SFT reads and learns of one row."""
  rows = _batch(run, batches.sft_batch, 'sft', row)
  loss_on = run.config.sft.loss_on
  tokens_BL, mask_BL, learned_BW = sft.LOSS_ON[loss_on](rows)
  shown = SequenceBatch(tokens_BL, mask_BL, rows.response_mask_BT)
  shown = _first(shown)
  learned_L = np.zeros(tokens_BL.shape[1], bool)
  learned_L[-learned_BW.shape[1] :] = np.asarray(learned_BW)[0]
  columns = {
      'position': _positions(shown),
      'learned': _marks(learned_L, 'learned'),
  }
  count = int(learned_L.sum())
  note = (
      f'sft.loss_on={loss_on}: {count} tokens are learned, each from the '
      'hidden state one column to its left'
  )
  return _table(run, f'SFT, row {row}', shown, columns, [note])


def reward_model_tables(run: Run, row: int) -> list[Table]:
  """What the reward model reads of the two responses of one pair."""
  pairs = _batch(run, batches.pair_batch, 'reward_model', row)
  pairs = jax.tree.map(jnp.asarray, pairs)
  c = run.config.reward_model

  def loss(chosen_BL: jax.Array, rejected_BL: jax.Array) -> jax.Array:
    return preference.pair_loss(
        chosen_BL,
        rejected_BL,
        pairs,
        loss=c.loss,
        pad_id=run.tokenizer.pad_token_id,
        num_padding_at_beginning=c.num_padding_at_beginning,
    )

  zeros = jnp.zeros(pairs.chosen.mask_BL.shape)
  tables = []
  grads = jax.grad(loss, argnums=(0, 1))(zeros, zeros)
  for name, grad_BL in zip(('chosen', 'rejected'), grads, strict=True):
    rows = _first(getattr(pairs, name))
    end = int(masking.last_real(rows.mask_BL)[0])
    columns = {
        'position': _positions(rows),
        'loss': _marks(np.asarray(grad_BL)[0] != 0, 'in the loss'),
        'score': _marks(np.arange(zeros.shape[1]) == end, 'score'),
    }
    note = f'the score is read in column {end}, the last real token'
    title = f'Reward model, row {row}, {name}'
    tables.append(_table(run, title, rows, columns, [note]))
  return tables


def _macro_actions(run: Run, rows: SequenceBatch) -> MacroActions | None:
  """The macro actions of a response; None where a model would be asked."""
  macro = run.config.macro
  rule = termination.TerminationSettings.from_config(macro)
  if rule.asks_models:
    return None
  mask_BT = jnp.asarray(rows.response_mask_BT)
  host_starts_BT = None
  if host := run.host_termination():
    with host:
      starts_BT, _ = host(masking.response_tokens(rows), mask_BT)
    host_starts_BT = jnp.asarray(starts_BT)
  inputs = termination.TerminationInputs(
      mask_BT=mask_BT,
      logprobs_BT=jnp.zeros(mask_BT.shape),
      keys_B=jax.random.split(run.spec.key('macro'), 1),
      host_starts_BT=host_starts_BT,
  )
  return termination.segment(inputs, rule)


def _macro_column(
    run: Run, macro: MacroActions | None, mask_T: np.ndarray
) -> tuple[str, list[str]]:
  """A note on the rule, and words for each response token, if it is known."""
  rule = f'macro.termination={run.config.macro.termination}'
  if macro is None:
    asks = 'asks a model for log-probs, which tools.explore --model=FOLDER does'
    return f'{rule} {asks}', []
  ids, starts = np.asarray(macro.ids_BT)[0], np.asarray(macro.starts_BT)[0]
  said = [
      f'{i}{" opens" if s else ""}' if m else ''
      for i, s, m in zip(ids, starts, mask_T, strict=True)
  ]
  return f'{rule}: {int(starts.sum())} macro actions', said


def ppo_table(run: Run, row: int) -> Table:
  """Macro actions and rewards of one row, its chosen response as rollout."""
  rows = _first(_batch(run, batches.sft_batch, 'ppo', row))
  length, width = rows.mask_BL.shape[1], run.prompt_len
  macro = _macro_actions(run, rows)
  spread = lambda texts: [''] * width + list(texts)
  mask_T = rows.response_mask_BT[0]
  nothing_BT = jnp.zeros(rows.response_mask_BT.shape)
  # A score of 1 and no KL show where the score lands.
  landed_BT = rewards.token_rewards(
      nothing_BT,
      nothing_BT,
      jnp.ones(1),
      jnp.asarray(rows.response_mask_BT),
      kl_coef=run.config.ppo.kl_coef,
      score_clip=run.config.ppo.score_clip,
  )
  lands = (width + np.flatnonzero(np.asarray(landed_BT)[0])).tolist()
  end = int(masking.last_real(rows.mask_BL)[0])
  reads_L = np.zeros(length, bool)
  reads_L[width - 1 : length - 1] = mask_T
  columns = {
      'position': _positions(rows),
      'value': _marks(reads_L, 'value'),
      'kl': spread(_marks(mask_T, '-kl')),
  }
  rule, said = _macro_column(run, macro, mask_T)
  if said:
    columns['macro action'] = spread(said)
  columns['score'] = _marks(np.arange(length) == end, 'score')
  columns['reward'] = _marks(np.isin(np.arange(length), lands), '+ score')
  notes = [
      rule,
      f'the score is read in column {end}; the reward lands in column {lands}; '
      'log-prob and value of a token are read one column to its left',
      'shown is the chosen response of the row; PPO samples its own',
  ]
  return _table(run, f'PPO, row {row}', rows, columns, notes)


def tables(run: Run, row: int) -> list[Table]:
  """The tables of all stages of the config."""
  made = []
  if 'sft' in run.config.stages:
    made.append(sft_table(run, row))
  if 'reward_model' in run.config.stages:
    made += reward_model_tables(run, row)
  if 'ppo' in run.config.stages:
    made.append(ppo_table(run, row))
  return made


def _piece(run: Run, token: int) -> str:
  """The text of one token, on one line."""
  names = {
      run.tokenizer.pad_token_id: '<pad>',
      run.tokenizer.bos_token_id: '<bos>',
      run.tokenizer.eos_token_id: '<eos>',
  }
  return names.get(token) or ascii(run.text([token]))


def describe(run: Run, table: Table) -> str:
  """A table as text; long runs of equal padding take one line."""
  heads = ['column', 'id', 'token', 'mask', *table.columns]
  cells = [
      [
          str(c),
          str(token),
          _piece(run, int(token)),
          str(int(real)),
          *(texts[c] for texts in table.columns.values()),
      ]
      for c, (token, real) in enumerate(
          zip(table.tokens_L, table.mask_L, strict=True)
      )
  ]
  lines, c = [heads], 0
  while c < len(cells):
    end = c
    # Positions may count on in padding; all else must be alike.
    alike = lambda n, c=c: cells[n][1:4] + cells[n][5:] == (
        cells[c][1:4] + cells[c][5:]
    )
    while end < len(cells) and not table.mask_L[end] and alike(end):
      end += 1
    if end - c >= _RUN:
      lines.append([f'{c}-{end - 1}', *cells[c][1:4], '', *cells[c][5:]])
      c = end
    else:
      lines.append(cells[c])
      c += 1
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  body = [
      '  '.join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
      for line in lines
  ]
  return '\n'.join([table.title, *body, *(f'  {n}' for n in table.notes)])


def show(config: ConfigDict, row: int) -> str:
  """All tables of a config as text; raises what a user can mend."""
  found = validation.problems(config) + validation.unreadable(config)
  validation.refuse(found)
  if row < 0:
    raise ValueError(f'--row={row} must be at least 0')
  with interrupts.temporary_folder() as folder:
    run = load_run(config, epath.Path(folder))
    return '\n\n'.join(describe(run, table) for table in tables(run, row))


def main(argv: list[str]) -> None:
  """Prints the tables of the recipe that the flags name."""
  checkpoint.quiet_logging()
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected arguments: {argv[1:]}')
    print(show(recipe_flag.CONFIG.value, flags.FLAGS.row))
  except (ValueError, OSError, ImportError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  absl_flags.define(tools.LAYOUT.flags)
  app.run(main, flags_parser=recipe_flag.parse)
