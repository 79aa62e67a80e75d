"""Examples -> token ids, cached -> the three parts -> fixed-shape batches.

Everything here is NumPy on the host. BOS is placed once, at the start of the
prompt, and EOS at the end of each response that was not cut.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import io
import json
from typing import TYPE_CHECKING

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data import tasks
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.structs import PairBatch, PromptBatch, SequenceBatch

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

Counts = dict[str, int]
# Raised whenever the same texts would be encoded or stored differently.
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Rows of different lengths in one flat array.

  Attributes:
    flat: int32 token ids of all rows, one after the other.
    offsets: int64 [rows + 1]; row i is `flat[offsets[i]:offsets[i + 1]]`.
  """

  flat: np.ndarray
  offsets: np.ndarray

  @classmethod
  def of(cls, rows: Sequence[Sequence[int]]) -> 'Ragged':
    """Stores `rows`."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    flat = [token for row in rows for token in row]
    return cls(np.asarray(flat, dtype=np.int32), offsets)

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, row: int) -> np.ndarray:
    return self.flat[self.offsets[row] : self.offsets[row + 1]]

  def lengths(self) -> np.ndarray:
    """int64 [rows]: tokens in each row."""
    return np.diff(self.offsets)

  def take(self, rows: Sequence[int]) -> 'Ragged':
    """Those rows, in that order."""
    return Ragged.of([self[row].tolist() for row in rows])


@dataclasses.dataclass(frozen=True)
class EncodedSet:
  """Tokenised examples.

  Attributes:
    prompt: ids, BOS first.
    chosen: ids of the preferred response, EOS last unless cut.
    rejected: ids of the other one, likewise.
    chosen_truncated: bool [rows], true where the response was cut.
    rejected_truncated: likewise.
  """

  prompt: Ragged
  chosen: Ragged
  rejected: Ragged
  chosen_truncated: np.ndarray
  rejected_truncated: np.ndarray

  def __len__(self) -> int:
    return len(self.prompt)

  def take(self, rows: Sequence[int]) -> 'EncodedSet':
    """Those rows, in that order."""
    rows = np.asarray(rows, dtype=np.int64)
    return EncodedSet(
        prompt=self.prompt.take(rows),
        chosen=self.chosen.take(rows),
        rejected=self.rejected.take(rows),
        chosen_truncated=self.chosen_truncated[rows],
        rejected_truncated=self.rejected_truncated[rows],
    )


def encode_examples(
    examples: Sequence[tasks.Example],
    tokenizer: 'PreTrainedTokenizerBase',
    *,
    prompt_len: int,
    response_len: int,
) -> tuple[EncodedSet, Counts]:
  """The token ids of examples that fit, and how many did not.

  Args:
    examples: prompts and responses as text.
    tokenizer: has pad, eos and bos ids.
    prompt_len: a longer prompt (tokens, BOS included) is dropped.
    response_len: a longer response (tokens, EOS included) is cut to so many
      tokens and gets no EOS. A pair that is equal then is dropped.

  Returns:
    The set, and counts: rows given, kept, dropped by reason, and responses cut
    among the rows kept.
  """
  prompts, chosen, rejected = (
      tokenizer_lib.encode_batch(
          tokenizer, [getattr(x, name) for x in examples]
      )
      for name in tasks.Example._fields
  )
  fit = lambda ids: [*ids, tokenizer.eos_token_id][:response_len]
  prompts = [[tokenizer.bos_token_id, *ids] for ids in prompts]
  pairs = [(fit(a), fit(b)) for a, b in zip(chosen, rejected, strict=True)]
  long = [len(ids) > prompt_len for ids in prompts]
  equal = [not x and a == b for x, (a, b) in zip(long, pairs, strict=True)]
  keep = [i for i in range(len(prompts)) if not long[i] and not equal[i]]
  cut = lambda rows: np.asarray(
      [len(rows[i]) >= response_len for i in keep], dtype=bool
  )
  encoded = EncodedSet(
      prompt=Ragged.of([prompts[i] for i in keep]),
      chosen=Ragged.of([pairs[i][0] for i in keep]),
      rejected=Ragged.of([pairs[i][1] for i in keep]),
      chosen_truncated=cut(chosen),
      rejected_truncated=cut(rejected),
  )
  return encoded, {
      'rows': len(prompts),
      'prompt too long': sum(long),
      'equal once cut': sum(equal),
      'kept': len(keep),
      'chosen cut': int(encoded.chosen_truncated.sum()),
      'rejected cut': int(encoded.rejected_truncated.sum()),
  }


def save(path: epath.PathLike, encoded: EncodedSet, counts: Counts) -> None:
  """Writes a set and its counts; the marker `<path>.done` comes last."""
  buffer = io.BytesIO()
  arrays = {
      f'{name}_{part}': getattr(getattr(encoded, name), part)
      for name in tasks.Example._fields
      for part in ('flat', 'offsets')
  }
  np.savez_compressed(
      buffer,
      chosen_truncated=encoded.chosen_truncated,
      rejected_truncated=encoded.rejected_truncated,
      counts=np.asarray(json.dumps(counts)),
      **arrays,
  )
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(buffer.getvalue())
  epath.Path(f'{path}.done').write_text('')


def load(path: epath.PathLike) -> tuple[EncodedSet, Counts]:
  """What `save` wrote."""
  stored = np.load(
      io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False
  )
  ragged = {
      name: Ragged(stored[f'{name}_flat'], stored[f'{name}_offsets'])
      for name in tasks.Example._fields
  }
  encoded = EncodedSet(
      chosen_truncated=stored['chosen_truncated'],
      rejected_truncated=stored['rejected_truncated'],
      **ragged,
  )
  return encoded, json.loads(str(stored['counts']))


def load_or_encode(
    examples: Sequence[tasks.Example],
    tokenizer: 'PreTrainedTokenizerBase',
    cache_dir: epath.PathLike,
    *,
    prompt_len: int,
    response_len: int,
) -> tuple[EncodedSet, Counts]:
  """`encode_examples`, kept under a key of all that decides its result."""
  digest = hashlib.sha256()
  lengths = [_FORMAT, prompt_len, response_len]
  digest.update(json.dumps(lengths).encode())
  digest.update(tokenizer_lib.fingerprint(tokenizer).encode())
  for example in examples:
    digest.update(json.dumps(example).encode())
  path = epath.Path(cache_dir) / f'{digest.hexdigest()[:32]}.npz'
  if epath.Path(f'{path}.done').exists():
    return load(path)
  encoded, counts = encode_examples(
      examples, tokenizer, prompt_len=prompt_len, response_len=response_len
  )
  save(path, encoded, counts)
  return encoded, counts


@dataclasses.dataclass(frozen=True)
class Datasets:
  """What the stages train and are evaluated on.

  Attributes:
    sft: rows of the SFT part.
    reward_model: pairs of the reward-model part.
    ppo: rows of the PPO part; only their prompts are used.
    eval: held-out rows.
    counts: 'data', 'sft', 'reward_model', 'ppo', 'eval' -> rows by fate.
  """

  sft: EncodedSet
  reward_model: EncodedSet
  ppo: EncodedSet
  eval: EncodedSet
  counts: dict[str, Counts]


STAGES = ('sft', 'reward_model', 'ppo')


def _tokenizer(
    config: ConfigDict, texts: Sequence[tasks.Example], workdir: epath.Path
) -> 'PreTrainedTokenizerBase':
  """The tokenizer of `tokenizer.path`, or one trained on `texts`, once."""
  if config.tokenizer.path:
    return tokenizer_lib.load_tokenizer(config.tokenizer.path)
  folder = str(workdir / 'tokenizer')
  if not tokenizer_lib.is_whole(folder):
    tokenizer_lib.train_tokenizer(
        [text for example in texts for text in example],
        config.tokenizer.vocab_size,
        folder,
    )
  return tokenizer_lib.load_tokenizer(folder)


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


def _check_sizes(config: ConfigDict, sets: dict[str, EncodedSet]) -> None:
  """Every part must fill one batch of its stage, and eval hold a row."""
  problems = [
      f'the {name} part has {len(sets[name])} rows, fewer than '
      f'{name}.batch_size={config[name].batch_size}'
      for name in STAGES
      if name in config.stages
      and len(sets[name]) < max(1, config[name].batch_size)
  ]
  if not len(sets['eval']):
    problems.append('no held-out row is left to evaluate on')
  if problems:
    raise ValueError(
        f'{"; ".join(problems)}. Give more rows, other data.parts='
        f'{tuple(config.data.parts)}, smaller batches or longer '
        'data.max_prompt_len and data.max_response_len '
        f'(now {config_lib.lengths(config)} tokens)'
    )


def prepare(
    config: ConfigDict,
    tokenizer: 'PreTrainedTokenizerBase | None',
    workdir: epath.PathLike,
) -> tuple[Datasets, 'PreTrainedTokenizerBase']:
  """Loads, splits and tokenises all that a run needs.

  Rows are dealt to the stages by `tasks.split_parts` before any is dropped.

  Args:
    config: see `config.base`.
    tokenizer: None = that of `tokenizer.path`, or where that is empty one
      trained on the SFT part and kept in `<workdir>/tokenizer`.
    workdir: of the run; holds tokenizer and cached rows (also gs://).

  Raises:
    FileNotFoundError, ValueError: as `tasks.load_examples`, and where a part
      is smaller than its stage's batch.
  """
  workdir = epath.Path(workdir)
  train, held_out, read = tasks.load_examples(config)
  indices = tasks.split_parts(
      len(train), config.data.parts, config.data.split_seed
  )
  parts = {
      name: [train[i] for i in rows if train[i] is not None]
      for name, rows in zip(STAGES, indices, strict=True)
  }
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
  _check_sizes(config, sets)
  return Datasets(**sets, counts=counts), tokenizer


def describe_counts(counts: dict[str, Counts]) -> str:
  """One line for each part of `Datasets.counts`."""
  lines = []
  for part, fates in counts.items():
    shown = [f'{n} {fate}' for fate, n in fates.items() if n or fate == 'kept']
    lines.append(f'{part:>12}: {", ".join(shown)}')
  return '\n'.join(lines)


def rows_of_step(
    seed: int, step: int, *, size: int, batch_size: int
) -> np.ndarray:
  """The rows of one batch, a function of seed and step alone.

  Epochs follow each other without a gap, each in an order of its own, and a
  batch may reach over into the next. So every row comes once an epoch; a row
  may come twice in a batch only where the batch holds parts of two epochs.

  Args:
    seed: of the orders.
    step: batch number, from 0.
    size: rows in the set, > 0.
    batch_size: rows in a batch; may exceed `size`.

  Returns:
    int64 [batch_size].
  """
  epoch, place = np.divmod(
      np.arange(step * batch_size, (step + 1) * batch_size), size
  )
  orders = {
      e: np.random.default_rng([seed, e]).permutation(size)
      for e in np.unique(epoch).tolist()
  }
  return np.asarray(
      [orders[e][p] for e, p in zip(epoch.tolist(), place, strict=True)],
      dtype=np.int64,
  )


def _pad(
    ragged: Ragged, rows: Sequence[int], width: int, pad_id: int, side: str
) -> tuple[np.ndarray, np.ndarray]:
  """int32 tokens and bool mask [rows, width], padded on `side`."""
  tokens = np.full((len(rows), width), pad_id, dtype=np.int32)
  mask = np.zeros((len(rows), width), dtype=bool)
  for place, row in enumerate(rows):
    ids = ragged[row]
    start = width - len(ids) if side == 'left' else 0
    if start < 0 or len(ids) > width:
      raise ValueError(f'row {row} has {len(ids)} tokens; {width} are allowed')
    tokens[place, start : start + len(ids)] = ids
    mask[place, start : start + len(ids)] = True
  return tokens, mask


def prompt_batch(
    data: EncodedSet,
    rows: Sequence[int],
    *,
    prompt_len: int,
    pad_id: int,
    sample_ids: Sequence[int] | None = None,
) -> PromptBatch:
  """Prompts of `rows`, padded on the left to `prompt_len`.

  Args:
    data: where the rows are.
    rows: their indices, which become the prompt ids.
    prompt_len: P, tokens.
    pad_id: on padding.
    sample_ids: which sample of its prompt each row is; None = 0 for all.
  """
  tokens_BP, mask_BP = _pad(data.prompt, rows, prompt_len, pad_id, 'left')
  samples = np.zeros(len(rows)) if sample_ids is None else sample_ids
  return PromptBatch(
      tokens_BP=tokens_BP,
      mask_BP=mask_BP,
      prompt_ids_B=np.asarray(rows, dtype=np.int32),
      sample_ids_B=np.asarray(samples, dtype=np.int32),
  )


def _sequences(
    prompt: tuple[np.ndarray, np.ndarray],
    response: tuple[np.ndarray, np.ndarray],
) -> SequenceBatch:
  return SequenceBatch(
      tokens_BL=np.concatenate([prompt[0], response[0]], axis=1),
      mask_BL=np.concatenate([prompt[1], response[1]], axis=1),
      response_mask_BT=response[1],
  )


def pair_batch(
    data: EncodedSet,
    rows: Sequence[int],
    *,
    prompt_len: int,
    response_len: int,
    pad_id: int,
) -> PairBatch:
  """Both responses of `rows` in the layout of `masking`; see `sft_batch`."""
  prompt = _pad(data.prompt, rows, prompt_len, pad_id, 'left')
  chosen = _pad(data.chosen, rows, response_len, pad_id, 'right')
  rejected = _pad(data.rejected, rows, response_len, pad_id, 'right')
  return PairBatch(
      chosen=_sequences(prompt, chosen), rejected=_sequences(prompt, rejected)
  )


def sft_batch(
    data: EncodedSet,
    rows: Sequence[int],
    *,
    prompt_len: int,
    response_len: int,
    pad_id: int,
) -> SequenceBatch:
  """Prompts and chosen responses of `rows` in the layout of `masking`.

  Args:
    data: where the rows are.
    rows: their indices.
    prompt_len: P, tokens; prompts are padded on the left.
    response_len: T, tokens; responses are padded on the right.
    pad_id: on padding.
  """
  prompt = _pad(data.prompt, rows, prompt_len, pad_id, 'left')
  chosen = _pad(data.chosen, rows, response_len, pad_id, 'right')
  return _sequences(prompt, chosen)
