"""The rows of a run, split into the parts that its stages train on."""

from collections.abc import Sequence
import dataclasses
import logging
from typing import TYPE_CHECKING

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import manifest
from ma_rlhf_jax.data import tasks
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.data.encoding import (
    Counts,
    EncodedSet,
    Ragged,
    load_or_encode,
)

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Datasets:
  """What the stages train and are evaluated on.

  Attributes:
    sft: rows of the SFT part.
    reward_model: pairs of the reward-model part.
    ppo: rows of the PPO part; only their prompts are used.
    eval: held-out rows that training is evaluated on.
    counts: 'data', 'sft', 'reward_model', 'ppo', 'eval' -> rows by fate.
    apart: held-out rows of the final comparison alone; None = those of `eval`.
  """

  sft: EncodedSet
  reward_model: EncodedSet
  ppo: EncodedSet
  eval: EncodedSet
  counts: dict[str, Counts]
  apart: EncodedSet | None = None

  @property
  def comparison(self) -> EncodedSet:
    """The held-out rows of the final comparison."""
    return self.eval if self.apart is None else self.apart

  @property
  def eval_mark(self) -> str:
    """Tells values on a part of the held-out rows from those on all; or ''."""
    return '' if self.apart is None else f' on {self.eval.digest[:12]}'

  @property
  def num_rows(self) -> dict[str, int]:
    """Rows of each stage that trains."""
    return {name: len(getattr(self, name)) for name in STAGES}


STAGES = ('sft', 'reward_model', 'ppo')


def _tokenizer(
    config: ConfigDict, texts: Sequence[tasks.Example], workdir: epath.Path
) -> 'PreTrainedTokenizerBase':
  """The tokenizer of `tokenizer.path`, or one trained on `texts`, once."""
  if config.tokenizer.path:
    return tokenizer_lib.load_tokenizer(config.tokenizer.path)
  folder = str(workdir / 'tokenizer')
  if not _is_whole(folder):
    tokenizer_lib.train_tokenizer(
        [text for example in texts for text in example],
        config.tokenizer.vocab_size,
        folder,
    )
  return tokenizer_lib.load_tokenizer(folder)


def _is_whole(folder: str) -> bool:
  """Whether a tokenizer was trained in this folder, and is undamaged."""
  try:
    return tokenizer_lib.is_whole(folder)
  except manifest.DamagedError as error:
    logging.warning('%s', error)
    return False


def _drop_truncated(
    encoded: EncodedSet, counts: Counts
) -> tuple[EncodedSet, Counts]:
  """The rows whose chosen response is whole."""
  whole = np.flatnonzero(~encoded.chosen_truncated)
  dropped = len(encoded) - len(whole)
  return encoded.take(whole), {
      **counts,
      'kept': len(whole),
      'dropped for a cut chosen': dropped,
      'chosen cut': 0,
      'rejected cut': int(encoded.rejected_truncated[whole].sum()),
  }


def shuffle_labels(encoded: EncodedSet, seed: int) -> EncodedSet:
  """The pairs, each swapped by a fair coin seeded with `seed`."""
  coin = np.random.default_rng(seed).random(len(encoded)) < 0.5
  pick = lambda heads, tails: Ragged.of(
      [(heads if c else tails)[i].tolist() for i, c in enumerate(coin)]
  )
  flags = encoded.chosen_truncated, encoded.rejected_truncated
  return EncodedSet(
      prompt=encoded.prompt,
      chosen=pick(encoded.rejected, encoded.chosen),
      rejected=pick(encoded.chosen, encoded.rejected),
      chosen_truncated=np.where(coin, flags[1], flags[0]),
      rejected_truncated=np.where(coin, flags[0], flags[1]),
  )


def _check_sizes(
    config: ConfigDict, sets: dict[str, EncodedSet], stages: Sequence[str]
) -> None:
  """Every stage needs a row, and eval two."""
  problems = [
      f'the {name} part has no rows'
      for name in STAGES
      if name in stages and not len(sets[name])
  ]
  if len(sets['eval']) < 2:
    problems.append(
        f'{len(sets["eval"])} held-out rows are left; an interval needs 2'
    )
  if problems:
    raise ValueError(
        f'{"; ".join(problems)}. Give more rows, other data.parts='
        f'{tuple(config.data.parts)}, or longer data.max_prompt_len and '
        f'data.max_response_len (now {config_lib.lengths(config)} tokens)'
    )


def _check_cache(folder: str) -> None:
  """Raises where `data.cache_dir` cannot be written to."""
  try:
    if folder:
      epath.Path(folder).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
        f'data.cache_dir={folder} cannot be made a folder ({error.strerror}); '
        "give one that may be written to, or '' for the workdir"
    ) from error


def _dealt(
    config: ConfigDict, rows: Sequence[tasks.Example | None]
) -> dict[str, list[tasks.Example]]:
  """Stage -> its rows, without those that are None."""
  indices = tasks.split_parts(
      len(rows), config.data.parts, config.data.split_seed
  )
  return {
      name: [rows[i] for i in part if rows[i] is not None]
      for name, part in zip(STAGES, indices, strict=True)
  }


def prepare(
    config: ConfigDict,
    tokenizer: 'PreTrainedTokenizerBase | None',
    workdir: epath.PathLike,
    stages: Sequence[str] | None = None,
) -> tuple[Datasets, 'PreTrainedTokenizerBase']:
  """Loads, splits and tokenises all that a run needs.

  Rows are dealt to the stages by `tasks.split_parts` before any is dropped.

  Args:
    config: see `config.base`.
    tokenizer: None = that of `tokenizer.path`, or where that is empty one
      trained on the SFT part and kept in `<workdir>/tokenizer`.
    workdir: of the run; holds tokenizer and cached rows (also gs://).
    stages: those that will train; None = those of the config.

  Raises:
    FileNotFoundError, ValueError: as `tasks.load_examples`, and where a stage
      has no rows.
  """
  workdir = epath.Path(workdir)
  _check_cache(config.data.cache_dir)
  train, held_out, read = tasks.load_examples(config)
  parts = _dealt(config, train)
  if tokenizer is None:
    tokenizer = _tokenizer(config, parts['sft'], workdir)
  prompt_len, response_len = config_lib.lengths(config)
  sets, counts = {}, {'data': read}
  for name, examples in {**parts, 'eval': held_out}.items():
    sets[name], counts[name] = load_or_encode(
        examples,
        tokenizer,
        config.data.cache_dir or workdir / 'data',
        prompt_len=prompt_len,
        response_len=response_len,
    )
  if config.data.drop_truncated:
    sets['sft'], counts['sft'] = _drop_truncated(sets['sft'], counts['sft'])
  if config.data.shuffle_labels:
    sets['reward_model'] = shuffle_labels(sets['reward_model'], config.seed)
  _check_sizes(config, sets, config.stages if stages is None else stages)
  return Datasets(**sets, counts=counts), tokenizer


def widths(config: ConfigDict, data: Datasets) -> tuple[int, int]:
  """(prompt columns P, response columns T) of every batch.

  What the config gives; where it gives 0 the longest row, rounded up to a
  multiple of 8, so that short rows are not padded to the limit of the task.
  """
  sets = (data.sft, data.reward_model, data.ppo, data.eval)
  longest = lambda rows: -(-max([8, *rows.lengths()]) // 8) * 8
  needed = (
      max(longest(s.prompt) for s in sets),
      max(longest(r) for s in sets for r in (s.chosen, s.rejected)),
  )
  given = config.data.max_prompt_len, config.data.max_response_len
  limits = config_lib.lengths(config)
  return tuple(
      int(g or min(n, limit))
      for g, n, limit in zip(given, needed, limits, strict=True)
  )


def few_updates(
    config: ConfigDict, data: Datasets, stages: Sequence[str]
) -> list[str]:
  """A warning for each of `stages` that makes less than ten updates."""
  return [
      f'{name} makes {steps} update(s): {rows} rows in batches of '
      f'{config[name].batch_size}; for more set {name}.epochs, {name}.steps or '
      f'a smaller {name}.batch_size'
      for name, rows in data.num_rows.items()
      if name in stages
      and (steps := config_lib.num_steps(config[name], rows)) < 10
  ]


def describe_counts(counts: dict[str, Counts]) -> str:
  """One line for each part of `Datasets.counts`."""
  lines = []
  for part, fates in counts.items():
    shown = [f'{n} {fate}' for fate, n in fates.items() if n or fate == 'kept']
    lines.append(f'{part:>12}: {", ".join(shown)}')
  return '\n'.join(lines)
