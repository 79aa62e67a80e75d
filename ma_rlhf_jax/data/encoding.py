"""Examples -> token ids, ragged, kept on disk between runs.

BOS is placed once, at the start of the prompt, and EOS at the end of each
response that was not cut.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import io
import json
import logging
from typing import TYPE_CHECKING

from etils import epath
import numpy as np

from ma_rlhf_jax import atomic_file, manifest
from ma_rlhf_jax.data import tasks
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.parallel import processes

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

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 (hex) of all token ids."""
    total = hashlib.sha256()
    for ragged in (self.prompt, self.chosen, self.rejected):
      total.update(ragged.offsets.tobytes())
      total.update(ragged.flat.tobytes())
    return total.hexdigest()

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


def _encode(
    examples: Sequence[tasks.Example], tokenizer: 'PreTrainedTokenizerBase'
) -> list[list[list[int]]]:
  """The ids of all prompts, chosen and rejected responses, none added."""
  return [
      tokenizer_lib.encode_batch(
          tokenizer, [getattr(x, name) for x in examples]
      )
      for name in tasks.Example._fields
  ]


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
  prompts, chosen, rejected = _encode(examples, tokenizer)
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
  """Writes a set and its counts.

  The marker `<path>.done` comes last and holds the SHA-256 of the file.
  """
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
  atomic_file.write_bytes(path, buffer.getvalue())
  written = hashlib.sha256(buffer.getvalue()).hexdigest()
  atomic_file.write_text(f'{path}.done', written + '\n')


def load(path: epath.PathLike) -> tuple[EncodedSet, Counts]:
  """What `save` wrote.

  Raises:
    DamagedError: if the file does not have the SHA-256 of its marker, or the
      marker holds none, as those of earlier versions.
  """
  content = epath.Path(path).read_bytes()
  written = epath.Path(f'{path}.done').read_bytes().strip()
  if not written:
    raise manifest.DamagedError(f'{path} is of a version without digests')
  if hashlib.sha256(content).hexdigest().encode() != written:
    raise manifest.DamagedError(
        f'{path} is damaged: its SHA-256 is not that in {path}.done'
    )
  stored = np.load(io.BytesIO(content), allow_pickle=False)
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
  """`encode_examples`, kept under a key of all that decides its result.

  The first process of several writes; it should call this before the others.
  """
  digest = hashlib.sha256()
  lengths = [_FORMAT, prompt_len, response_len]
  digest.update(json.dumps(lengths).encode())
  digest.update(tokenizer_lib.fingerprint(tokenizer).encode())
  for example in examples:
    digest.update(json.dumps(example).encode())
  path = epath.Path(cache_dir) / f'{digest.hexdigest()[:32]}.npz'
  if epath.Path(f'{path}.done').exists():
    try:
      return load(path)
    except (manifest.DamagedError, FileNotFoundError) as why:
      logging.warning('%s; it is made again', why)
  encoded, counts = encode_examples(
      examples, tokenizer, prompt_len=prompt_len, response_len=response_len
  )
  if processes.is_first():
    save(path, encoded, counts)
  return encoded, counts
