"""Text to token ids: a model's own tokenizer, or one trained on the run's data.

BOS and EOS are placed by `data.batches`, never here: `encode` gives the ids of
the text alone, whatever the tokenizer would add, and the text `<eos>` gives the
ids of its characters, not the special id.
"""

import collections
from collections.abc import Iterable, Sequence
import hashlib
import json
from typing import TYPE_CHECKING

from etils import epath

from ma_rlhf_jax import atomic_file, interrupts, manifest
from ma_rlhf_jax.data import tokenizer_files

if TYPE_CHECKING:
  import tokenizers
  from transformers import PreTrainedTokenizerBase

# Gemma's layout: these, then 256 byte tokens, then what was learned.
SPECIAL_TOKENS = ('<pad>', '<eos>', '<bos>', '<unk>')
BYTE_TOKENS = tuple(f'<0x{byte:02X}>' for byte in range(256))
# Single characters and merges that a trained tokenizer needs at least.
MIN_PIECES = 28
# Of the learned pieces at most this share are single characters; rarer
# characters are spelt in bytes.
MAX_ALPHABET_SHARE = 0.5
# Either makes a tokenizer.
_VOCABULARIES = ('tokenizer.json', 'tokenizer.model')
_SETTINGS = 'tokenizer_config.json'


def has_vocabulary(folder: str) -> bool:
  """Whether a folder holds what a tokenizer is made of."""
  return any((epath.Path(folder) / name).exists() for name in _VOCABULARIES)


def load_tokenizer(path: str) -> 'PreTrainedTokenizerBase':
  """The tokenizer of a folder or hub id, with pad, eos and bos ids.

  Args:
    path: folder (also gs://) or hub id; code in it is never run.

  Raises:
    FileNotFoundError: if a folder holds no vocabulary.
    ValueError: if a file is broken, if it has no tokenizer.json form, or if
      pad, eos and bos are not three different ids.
  """
  # transformers would make up an empty vocabulary for a folder of a Gemma.
  if ('://' in path or epath.Path(path).is_dir()) and not has_vocabulary(path):
    raise FileNotFoundError(
        f'{path} holds no {" or ".join(_VOCABULARIES)}; copy the tokenizer of '
        'the model into it'
    )
  if '://' not in path:
    return check_tokenizer(tokenizer_files.load(path), path)
  with interrupts.temporary_folder() as local:
    for file in epath.Path(path).glob('*token*'):
      file.copy(epath.Path(local) / file.name)
    return check_tokenizer(tokenizer_files.load(local), path)


def check_tokenizer(
    tokenizer: 'PreTrainedTokenizerBase', path: str
) -> 'PreTrainedTokenizerBase':
  """`tokenizer`, once it is known to serve; raises as `load_tokenizer`."""
  if not tokenizer.is_fast:
    raise ValueError(
        f'the tokenizer of {path} loads as {type(tokenizer).__name__}, which '
        'has no tokenizer.json form; save it once as a fast tokenizer'
    )
  ids = {
      name: getattr(tokenizer, f'{name}_token_id')
      for name in ('pad', 'eos', 'bos')
  }
  if None in ids.values() or len(set(ids.values())) < 3:
    raise ValueError(
        f'the tokenizer of {path} has the special ids {ids}; pad, eos and bos '
        'must be three different ids; set them in its tokenizer_config.json '
        '(an unused token of the vocabulary serves as pad)'
    )
  return tokenizer


def encode_batch(
    tokenizer: 'PreTrainedTokenizerBase', texts: Sequence[str]
) -> list[list[int]]:
  """The ids of each text alone; no BOS, no EOS, no other special id.

  Raises:
    ValueError: if the tokenizer spells some text with a special id; Gemma's
      and those trained here never do.
  """
  if not texts:
    return []
  ids = tokenizer(
      list(texts),
      add_special_tokens=False,
      split_special_tokens=True,  # the text '<eos>' is not the eos token
      return_attention_mask=False,
      padding=False,
      truncation=False,
      verbose=False,
  )['input_ids']
  special = {
      tokenizer.pad_token_id,
      tokenizer.eos_token_id,
      tokenizer.bos_token_id,
  }
  for text, row in zip(texts, ids, strict=True):
    if not special.isdisjoint(row):
      raise ValueError(
          f'the tokenizer spells the text {text[:80]!r} with one of its '
          f'special ids {sorted(special)}; take its special strings out of '
          'the data'
      )
  return ids


def encode(tokenizer: 'PreTrainedTokenizerBase', text: str) -> list[int]:
  """The ids of one text alone; see `encode_batch`."""
  return encode_batch(tokenizer, [text])[0]


def decode(tokenizer: 'PreTrainedTokenizerBase', ids: Sequence[int]) -> str:
  """The text of `ids`, special tokens spelt out, blanks left as they are."""
  return tokenizer.decode(
      list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
  )


def fingerprint(tokenizer: 'PreTrainedTokenizerBase') -> str:
  """SHA-256 (hex) of all that decides the ids of a text."""
  backend = json.loads(tokenizer.backend_tokenizer.to_str())
  # Left behind by the last call, whatever it was.
  backend.update(padding=None, truncation=None)
  ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
  text = json.dumps([backend, ids], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _alphabet(texts: Iterable[str], size: int) -> list[str]:
  """The `size` most frequent characters, ties by code point; never '<'."""
  counts = collections.Counter()
  for text in texts:
    counts.update(text)
  counts.pop('<', None)
  ranked = sorted(counts, key=lambda char: (-counts[char], char))
  return sorted([*ranked[: size - 1], '<'])


def _pre_tokenizer() -> 'tokenizers.pre_tokenizers.PreTokenizer':
  """Cuts before blanks, and around '<' and newlines.

  A piece may start with blanks and holds them literally, so decoding is plain
  concatenation. No piece of two characters holds '<', so none can be spelt
  like a special or a byte token.
  """
  from tokenizers import Regex, pre_tokenizers

  return pre_tokenizers.Sequence(
      [
          pre_tokenizers.Split(Regex('[<\n]'), 'isolated'),
          pre_tokenizers.Split(' ', 'merged_with_next'),
      ]
  )


def _train_pieces(
    texts: Sequence[str], num_pieces: int
) -> tuple[list[str], list[tuple[str, str]]]:
  """Learned pieces in the order of their ids, and merges by rank."""
  from tokenizers import Tokenizer, models, trainers

  alphabet = _alphabet(texts, int(num_pieces * MAX_ALPHABET_SHARE))
  learner = Tokenizer(models.BPE())
  learner.pre_tokenizer = _pre_tokenizer()
  learner.train_from_iterator(
      texts,
      trainers.BpeTrainer(
          vocab_size=num_pieces,
          initial_alphabet=alphabet,
          limit_alphabet=len(alphabet),
          show_progress=False,
      ),
  )
  model = json.loads(learner.to_str())['model']
  pieces = sorted(model['vocab'], key=model['vocab'].get)
  return pieces, [tuple(merge) for merge in model['merges']]


def _build(
    pieces: Sequence[str], merges: Sequence[tuple[str, str]]
) -> 'tokenizers.Tokenizer':
  """BPE in Gemma's layout that adds BOS, as Gemma's does."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, processors

  names = [*SPECIAL_TOKENS, *BYTE_TOKENS, *pieces]
  tokenizer = Tokenizer(
      models.BPE(
          vocab={name: index for index, name in enumerate(names)},
          merges=list(merges),
          unk_token='<unk>',
          byte_fallback=True,
          fuse_unk=False,
      )
  )
  tokenizer.pre_tokenizer = _pre_tokenizer()
  tokenizer.decoder = decoders.Sequence(
      [decoders.ByteFallback(), decoders.Fuse()]
  )
  tokenizer.post_processor = processors.TemplateProcessing(
      single='<bos> $A',
      pair='<bos> $A <bos> $B',
      special_tokens=[('<bos>', SPECIAL_TOKENS.index('<bos>'))],
  )
  tokenizer.add_special_tokens(
      [AddedToken(name, normalized=False) for name in SPECIAL_TOKENS]
  )
  return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str) -> None:
  """Trains a BPE tokenizer in Gemma's layout and writes its folder.

  Ids: pad 0, eos 1, bos 2, unk 3, 256 byte tokens, then learned pieces. For
  every text `decode(encode(text)) == text`. The same texts give the same files.

  Args:
    texts: what to learn from.
    vocab_size: ids in all; fewer come out where the texts hold too few pieces.
    folder: where to write (also gs://); its manifest comes last.

  Raises:
    ValueError: if `vocab_size` leaves too few learned pieces.
  """
  fixed = len(SPECIAL_TOKENS) + len(BYTE_TOKENS)
  if vocab_size < fixed + MIN_PIECES:
    raise ValueError(
        f'tokenizer.vocab_size={vocab_size}: {fixed} ids are special and byte '
        f'tokens; set it to {fixed + MIN_PIECES} or more'
    )
  pieces, merges = _train_pieces(list(texts), vocab_size - fixed)
  settings = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'clean_up_tokenization_spaces': False,
      'padding_side': 'left',
      **{f'{name.strip("<>")}_token': name for name in SPECIAL_TOKENS},
  }
  path = epath.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  text = _build(pieces, merges).to_str(True)
  atomic_file.write_text(path / 'tokenizer.json', text)
  atomic_file.write_json(path / _SETTINGS, settings)
  manifest.write(path, manifest.entries(path, ['tokenizer.json', _SETTINGS]))


def is_whole(folder: str) -> bool:
  """Whether `train_tokenizer` has finished in this folder.

  Of a folder without a manifest, which earlier versions wrote, it is asked
  whether its files are JSON.

  Raises:
    DamagedError: if it has, and a file is not as it was written.
  """
  remedy = 'it is made again'
  if manifest.verify(folder, remedy=remedy):
    return True
  for name in ('tokenizer.json', _SETTINGS):
    path = epath.Path(folder) / name
    try:
      json.loads(path.read_bytes())
    except FileNotFoundError:
      return False
    except ValueError as error:
      raise manifest.DamagedError(
          f'{path} is damaged ({error}); {remedy}'
      ) from error
  return True
