"""The files of a tokenizer, and which of them is broken where one is."""

from collections.abc import Iterator
import pathlib
from reprlib import repr as shown  # of what may be anything, shortened
from typing import TYPE_CHECKING, Any

from ma_rlhf_jax.data import files

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_TABLE = 'tokenizer.json'
_SETTINGS = 'tokenizer_config.json'
_PIECES = 'tokenizer.model'
_MODELS = ('BPE', 'Unigram', 'WordLevel', 'WordPiece')
_TOKENS = ('bos_token', 'eos_token', 'pad_token', 'unk_token')
_MAX_BYTES = 256 * 2**20  # the tokenizer.json of Gemma has 33 MB
# What transformers trips over in broken files.
_BROKEN = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load(folder: str) -> 'PreTrainedTokenizerBase':
  """What transformers makes of a folder or hub id; runs no code in it.

  Raises:
    ValueError: names the file that is broken, what it holds and what to do.
  """
  from transformers import AutoTokenizer

  try:
    return AutoTokenizer.from_pretrained(folder)
  # The tokenizers library raises a bare Exception; any other type than that
  # and _BROKEN goes on its way.
  except Exception as error:
    if type(error) is not Exception and not isinstance(error, _BROKEN):
      raise
    found = next(_problems(pathlib.Path(folder)), '')
    said = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise ValueError(
        found
        or f'the tokenizer in {folder} cannot be read ({said}); download '
        f'{_TABLE} and {_SETTINGS} again'
    ) from error


def _problems(folder: pathlib.Path) -> Iterator[str]:
  for name in (_TABLE, _SETTINGS, 'special_tokens_map.json', 'config.json'):
    path = folder / name
    if path.is_file():
      try:
        content = files.read_json(path, _MAX_BYTES)
      except ValueError as error:
        yield str(error)
      else:
        yield from _of_content(path, content)
  if (folder / _PIECES).is_file() and not (folder / _TABLE).is_file():
    yield (
        f'{folder / _PIECES} '
        + (files.foreign(folder / _PIECES) or 'cannot be read')
        + f'; copy the {_TABLE} of the model beside it, which is read instead'
    )


def _of_content(path: pathlib.Path, content: dict[str, Any]) -> Iterator[str]:
  again = 'download it again, or copy that of the base model'
  if path.name == _TABLE:
    model = content.get('model')
    kind = model.get('type') if isinstance(model, dict) else model
    if kind not in _MODELS:
      yield (
          f'{path}: the type of its model is {shown(kind)}; it must be one of '
          f'{", ".join(_MODELS)}; {again}'
      )
    elif 'added_tokens' not in content or 'vocab' not in model:
      yield f'{path} holds no vocabulary or no added_tokens; {again}'
  if path.name == _SETTINGS:
    for name, value in content.items():
      text = name == 'tokenizer_class' or name in _TOKENS
      kinds = (str, dict) if name in _TOKENS else str
      if text and value is not None and not isinstance(value, kinds):
        yield f'{path}: {name} is {shown(value)}; it must be text; {again}'
