"""Shows macro actions, and advantages under two rules.

Responses are texts, or rows of a JSONL file. Printed are their macro actions,
how long these are, and what a terminal reward does to the advantage of each
token, for both rules side by side. Segmentation and estimation are those of
training.

Exit codes: 0 done; 1 an error; 130 Ctrl-C.
"""

from collections.abc import Sequence
import copy
import dataclasses
import gzip
import math
import pathlib
import sys
from typing import TYPE_CHECKING, Any
import zlib

from ma_rlhf_jax import interrupts
from ma_rlhf_jax.commands import command, tools

if __name__ == '__main__':  # before the imports below, which take seconds
  interrupts.end_on_ctrl_c()
  command.answer(tools.EXPLORE)

from absl import app, flags
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import atomic_file, recipe_flag, switches, validation
from ma_rlhf_jax.commands import absl_flags
from ma_rlhf_jax.data import outputs
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.data.prompts import parse_line, text_problem
from ma_rlhf_jax.macro import aggregate, host, termination
from ma_rlhf_jax.macro.spelling import Speller
from ma_rlhf_jax.models import huggingface
from ma_rlhf_jax.objective import rewards, targets
from ma_rlhf_jax.objective.advantage import Objective
from ma_rlhf_jax.parallel.mesh import matmul_precision
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.structs import MacroActions, Scored, SequenceBatch
from ma_rlhf_jax.tools import explore_view
from ma_rlhf_jax.tools.explore_view import Ruled, Told
from ma_rlhf_jax.training import checkpoint, products

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_COLUMNS = ('response', 'text', 'chosen')
# Pieces of the tokenizer that is trained where none is given.
_VOCAB_SIZE = 1024

# --config is rule A.
_OTHER = recipe_flag.define('other', tools.OTHER.help)
absl_flags.define(tools.EXPLORE.flags)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Responses to look at.

  Attributes:
    ids: tokens of each, EOS included.
    prompts: tokens before each, BOS included.
    given: the rows as read; may hold ref_logprobs, logprobs, values, score.
  """

  ids: list[list[int]]
  prompts: list[list[int]]
  given: list[dict[str, Any]]

  def array(self, name: str, default: float) -> np.ndarray:
    """float32 [B, T] of a per-token field; ValueError on a wrong one."""
    made = np.full(self.mask.shape, default, np.float32)
    for number, (ids, row) in enumerate(zip(self.ids, self.given, strict=True)):
      if (values := row.get(name)) is None:
        continue
      if not isinstance(values, list) or not all(map(_is_number, values)):
        raise ValueError(f'row {number + 1}: {name} must be a list of numbers')
      if len(values) != len(ids):
        raise ValueError(
            f'row {number + 1}: {name} has {len(values)} numbers, the response '
            f'{len(ids)} tokens with EOS; give one for each'
        )
      made[number, : len(ids)] = values
    return made

  @property
  def mask(self) -> np.ndarray:
    """bool [B, T]."""
    width = max(map(len, self.ids))
    return np.array([[t < len(ids) for t in range(width)] for ids in self.ids])

  @property
  def tokens(self) -> np.ndarray:
    """int32 [B, T], 0 on padding."""
    made = np.zeros(self.mask.shape, np.int32)
    made[self.mask] = [token for ids in self.ids for token in ids]
    return made


def _is_number(value: Any) -> bool:
  return type(value) in (int, float)


def _row(line: str, where: str, column: str | None) -> dict[str, Any]:
  """A line of a JSONL file; its response is put under `text`."""
  try:
    row = parse_line(line)
  except ValueError as error:
    raise ValueError(f'{where} {error}') from None
  if not isinstance(row, dict):
    raise ValueError(f'{where} must be an object of named columns')
  names = [column] if column else [n for n in _COLUMNS if n in row]
  if not names or not isinstance(row.get(names[0]), str):
    raise ValueError(
        f'{where} has no text in {column or ", ".join(_COLUMNS)}; it has '
        f'{", ".join(row) or "nothing"}; name the column by --column'
    )
  row = {**row, 'text': row[names[0]]}
  for name in ('text', 'prompt'):
    if problem := text_problem(row.get(name, '')):
      raise ValueError(f'{where}: {name} {problem}')
  if not _is_number(row.get('score', 0)):
    raise ValueError(f'{where}: score is {row["score"]!r}; it must be a number')
  return row


def read_rows(path: str, column: str | None, limit: int) -> list[dict]:
  """Rows of a JSONL file; the response is put under `text`."""
  opener = gzip.open if path.endswith('.gz') else open
  rows = []
  try:
    with opener(path, 'rt', encoding='utf-8') as lines:
      for number, line in enumerate(lines, start=1):
        if len(rows) == limit:
          break
        if line.strip():
          rows.append(_row(line, f'--input={path}, line {number}', column))
  except (EOFError, UnicodeDecodeError, zlib.error) as error:
    raise ValueError(f'--input={path} is cut or no text: {error}') from error
  if not rows:
    raise ValueError(f'--input={path} holds no row')
  return rows


def _folder(model: str) -> pathlib.Path:
  """The local folder of what --model may be."""
  source = products.locate('--model', model, 'policy')
  return huggingface.resolve(source.path)


def load_tokenizer(
    name: str | None, texts: Sequence[str]
) -> 'PreTrainedTokenizerBase':
  """The tokenizer of what is named, or one trained on the texts."""
  if name:
    return tokenizer_lib.load_tokenizer(str(_folder(name)))
  with interrupts.temporary_folder() as folder:
    tokenizer_lib.train_tokenizer(texts, _VOCAB_SIZE, folder)
    return tokenizer_lib.load_tokenizer(folder)


def encode(given: list[dict], tokenizer: 'PreTrainedTokenizerBase') -> Rows:
  """Tokens as in training: BOS before the prompt, EOS after the response."""
  code = lambda name: tokenizer_lib.encode_batch(
      tokenizer, [row.get(name) or '' for row in given]
  )
  return Rows(
      ids=[[*ids, tokenizer.eos_token_id] for ids in code('text')],
      prompts=[[tokenizer.bos_token_id, *ids] for ids in code('prompt')],
      given=given,
  )


def score_with(
    model: str, rows: Rows, pad_id: int, temperature: float
) -> np.ndarray:
  """float32 [B, T]: log-probs of the responses under a model, nats."""
  folder = _folder(model)
  shape = huggingface.read_shape(folder)
  params = huggingface.load_params(folder, shape)
  width = max(map(len, rows.prompts))
  pads = [width - len(prompt) for prompt in rows.prompts]
  prompts = np.array(
      [[pad_id] * n + p for n, p in zip(pads, rows.prompts, strict=True)]
  )
  real = np.arange(width)[None] >= np.array(pads)[:, None]
  sequences = SequenceBatch(
      tokens_BL=jnp.asarray(
          np.concatenate([prompts, rows.tokens], 1), jnp.int32
      ),
      mask_BL=jnp.asarray(np.concatenate([real, rows.mask], 1)),
      response_mask_BT=jnp.asarray(rows.mask),
  )
  logprobs, _ = jax.jit(
      lambda params: scoring.response_logprobs(
          shape, params, sequences, temperature=temperature
      )
  )(params)
  return np.asarray(logprobs)


def segment(
    config: ConfigDict,
    rows: Rows,
    scored: Scored,
    tokenizer: 'PreTrainedTokenizerBase',
) -> tuple[MacroActions, str]:
  """The macro actions of training under this config, and what to note."""
  host_starts_BT, note, m = None, '', config.macro
  if m.termination in host.NAMES:
    fields = dataclasses.fields(host.HostSettings)
    settings = host.HostSettings(**{f.name: m[f.name] for f in fields})
    with host.HostTermination(settings, tokenizer) as rule:
      starts_BT, numbers = rule(rows.tokens, rows.mask)
    host_starts_BT = jnp.asarray(starts_BT)
    note = _fallbacks(numbers, m.parse_fallback)
  old = m.logprobs == 'old'
  inputs = termination.TerminationInputs(
      mask_BT=jnp.asarray(rows.mask),
      logprobs_BT=scored.logprobs_BT if old else scored.ref_logprobs_BT,
      keys_B=jax.random.split(jax.random.key(config.seed), len(rows.ids)),
      host_starts_BT=host_starts_BT,
      scored=scored,
  )
  settings = termination.TerminationSettings.from_config(m)
  return termination.segment(inputs, settings), note


def _fallbacks(counts: dict[str, np.ndarray], fallback: str) -> str:
  """How many sentences had no usable tree; '' where all had, or none is."""
  count = int(np.sum(counts.get('fallbacks', 0)))
  if not count:
    return ''
  sentences = int(np.sum(counts['sentences']))
  return (
      f'{count} of {sentences} sentences without a usable tree, segmented by '
      f'macro.parse_fallback={fallback}'
  )


def _score_words(row: dict[str, Any], score: float, clip: float) -> str:
  """'3.01187 (from the row), clipped to 2.5'."""
  words = f'{score:g}' + (' (from the row)' if 'score' in row else '')
  if clip and abs(score) > clip:
    words += f', clipped to {math.copysign(clip, score):g}'
  return words


def _scored(rows: Rows, ref_logprobs: np.ndarray) -> Scored:
  """What the models would say; policy = reference unless rows say more."""
  logprobs = rows.array('logprobs', np.nan)
  logprobs = np.where(np.isnan(logprobs), ref_logprobs, logprobs)
  scores = [row.get('score', flags.FLAGS.score) for row in rows.given]
  return Scored(
      logprobs_BT=jnp.asarray(logprobs),
      ref_logprobs_BT=jnp.asarray(ref_logprobs),
      entropy_BT=jnp.zeros(rows.mask.shape),
      values_BT=jnp.asarray(rows.array('values', flags.FLAGS.value)),
      score_B=jnp.asarray(scores, jnp.float32),
  )


def _ref_logprobs(rows: Rows, config: ConfigDict, pad: int) -> np.ndarray:
  """From the model or the rows; 0 where the rule does not ask for them."""
  if flags.FLAGS.model:
    temperature = config.ppo.logprob_temperature or config.rollout.temperature
    with matmul_precision(config.model.matmul_precision):
      return score_with(flags.FLAGS.model, rows, pad, temperature)
  missing = [n for n, r in enumerate(rows.given) if not r.get('ref_logprobs')]
  rule = config.macro.termination
  if rule in termination.BY_PROBABILITY and missing:
    raise ValueError(
        f'macro.termination={rule!r} asks for probabilities, and row '
        f'{missing[0] + 1} has no ref_logprobs; give --model=FOLDER, or '
        'ref_logprobs (nats, one a token) in each row of --input'
    )
  return rows.array('ref_logprobs', 0.0)


def _check(config: ConfigDict, name: str) -> None:
  if found := validation.problems(config):
    raise ValueError(f'--{name}: ' + '\n  '.join(found))
  if targets.BASELINES[config.ppo.baseline].min_samples > 1:
    raise ValueError(
        f'--{name}: ppo.baseline={config.ppo.baseline} needs several samples'
    )


def _ruled(
    config: ConfigDict,
    rows: Rows,
    scored: Scored,
    tokenizer: 'PreTrainedTokenizerBase',
) -> Ruled:
  """What the rule of a config makes of the rows."""
  macro, note = segment(config, rows, scored, tokenizer)
  objective = Objective.from_config(config)
  rewards_BT = rewards.token_rewards(
      scored.logprobs_BT,
      scored.ref_logprobs_BT,
      scored.score_B,
      macro.mask_BT,
      kl_coef=config.ppo.kl_coef,
      score_clip=objective.score_clip,
  )
  aims = targets.estimate(scored.values_BT, rewards_BT, macro, objective)
  lengths = np.asarray(aggregate.lengths(macro))
  numbers = jax.device_get(aggregate.statistics(macro))
  described = switches.describe(config).splitlines()[0]
  return Ruled(
      name=described.removeprefix('macro actions: '),
      ids=np.asarray(macro.ids_BT),
      advantages=np.asarray(aims.advantages_BT),
      lengths=lengths[lengths > 0],
      statistics={name: float(x) for name, x in numbers.items()},
      note=note,
  )


def explore(config: ConfigDict, other: ConfigDict) -> Told:
  """Reads, segments and estimates; raises what a user can mend."""
  if flags.FLAGS.html:
    outputs.check_place('html', flags.FLAGS.html)
  for name, c in (('config', config), ('other', other)):
    _check(c, name)
  given = [{'text': text} for text in flags.FLAGS.text]
  if flags.FLAGS.input:
    given += read_rows(
        flags.FLAGS.input, flags.FLAGS.column, flags.FLAGS.max_rows
    )
  if not given:
    raise ValueError("nothing to show; give --text='...' or --input=rows.jsonl")
  texts = [row['text'] for row in given]
  tokenizer = load_tokenizer(flags.FLAGS.tokenizer or flags.FLAGS.model, texts)
  rows = encode(given, tokenizer)
  speller = Speller(tokenizer)
  ruled = []
  for c in (config, other):
    scored = _scored(rows, _ref_logprobs(rows, c, tokenizer.pad_token_id))
    ruled.append(_ruled(c, rows, scored, tokenizer))
  pieces = []
  for ids in rows.ids:
    spelt = speller(ids)
    cut = [
        spelt.text[b:e] for b, e in zip(spelt.begins, spelt.ends, strict=True)
    ]
    pieces.append([*cut[:-1], '<eos>'])
  trained = not (flags.FLAGS.tokenizer or flags.FLAGS.model)
  scores = [
      _score_words(row, score, config.ppo.score_clip)
      for row, score in zip(
          given, np.asarray(scored.score_B).tolist(), strict=True
      )
  ]
  return Told(pieces, ruled, scores, trained)


def _token_ppo(config: ConfigDict) -> ConfigDict:
  """The same without macro actions."""
  other = copy.deepcopy(config)
  switches.select_controls(other, ['token_ppo'])
  return other


def main(argv: list[str]) -> None:
  """Prints, and writes the page that --html names."""
  checkpoint.quiet_logging()
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected arguments: {argv[1:]}')
    config = recipe_flag.CONFIG.value
    told = explore(config, _OTHER.value or _token_ppo(config))
    color = flags.FLAGS.color == 'always'
    color |= flags.FLAGS.color == 'auto' and sys.stdout.isatty()
    print(explore_view.text(told, flags.FLAGS.rows, color))
    if flags.FLAGS.html:
      page = explore_view.page(told, flags.FLAGS.rows)
      atomic_file.write_text(flags.FLAGS.html, page)
      print(f'written: {flags.FLAGS.html}')
  except (ValueError, OSError, ImportError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main, flags_parser=recipe_flag.parse)
