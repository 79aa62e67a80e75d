"""Responses as text, with the characters that each token stands for.

  tokens      Hi   ,  \\n\\n   you  <0xC3>  <0xA9>   eos
  characters  Hi   ,  \\n\\n   you  é       é
  begins      0    2   3      5    8       8        9
  ends        2    3   5      8    9       9        9

Rules that read text give offsets into it; `starts` says which tokens open
there.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import TYPE_CHECKING

import numpy as np

from ma_rlhf_jax.data import tokenizer as tokenizer_lib

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r'<0x([0-9A-Fa-f]{2})>')
# What decoding gives where bytes are no character.
_BROKEN = '\ufffd'
# Ids whose spelling is compared with the tokenizer's own at the start.
_SAMPLE = 1_000


@dataclasses.dataclass(frozen=True)
class Spelling:
  """A response as text.

  Attributes:
    text: without special tokens; U+FFFD where bytes are no UTF-8.
    begins: int [T], offset of each token's first character. A token that holds
      part of a character begins at that character.
    ends: int [T], offset behind the last one; `begins` for a token without
      characters, such as EOS.
  """

  text: str
  begins: np.ndarray
  ends: np.ndarray


def character_of_byte(data: bytes) -> tuple[str, np.ndarray]:
  """`data` as text, and int [bytes]: the character that each byte belongs to.

  Broken UTF-8 is replaced as `bytes.decode(errors='replace')` does.
  """
  values = np.frombuffer(data, np.uint8)
  first = (values & 0xC0) != 0x80  # 10xxxxxx continues a character
  at = 0
  while True:
    try:
      data[at:].decode()
      break
    except UnicodeDecodeError as error:
      first[at + error.start : at + error.end] = False
      first[at + error.start] = True
      at += error.end
  return data.decode(errors='replace'), np.cumsum(first) - 1


class Speller:
  """Spells token ids as text with the offsets of each token.

  Args:
    tokenizer: must decode ids one by one to the pieces that it decodes them to
      together, as Gemma's does and those of `data.tokenizer`.

  Raises:
    ValueError: if it does not.
  """

  def __init__(self, tokenizer: 'PreTrainedTokenizerBase'):
    self._tokenizer = tokenizer
    self._special = frozenset(tokenizer.all_special_ids)
    self._pieces: dict[int, bytes] = {}
    self._check()

  def _check(self) -> None:
    size = len(self._tokenizer)
    ids = np.unique(np.linspace(0, size - 1, min(size, _SAMPLE)).astype(int))
    ids = [int(i) for i in ids if i not in self._special]
    pieces = {i: self._piece(i) for i in ids}
    # Lone bytes of a character have no text to compare.
    ids = [i for i in ids if _BROKEN not in pieces[i].decode(errors='replace')]
    joined = b''.join(pieces[i] for i in ids).decode()
    if joined != tokenizer_lib.decode(self._tokenizer, ids):
      raise ValueError(
          f'tokenizer {self._tokenizer.name_or_path!r} decodes tokens in a row '
          'to another text than one by one, so what each of them stands for '
          'is not known; use one whose tokens hold their blanks, such as '
          "Gemma's, or a macro.termination that does not read text"
      )

  def _piece(self, token_id: int) -> bytes:
    """The bytes of one token, from the cache."""
    if token_id not in self._pieces:
      self._pieces[token_id] = self._spell(token_id)
    return self._pieces[token_id]

  def _spell(self, token_id: int) -> bytes:
    if token_id in self._special:
      return b''
    text = tokenizer_lib.decode(self._tokenizer, [token_id])
    if _BROKEN not in text:
      return text.encode()
    name = self._tokenizer.convert_ids_to_tokens(token_id)
    if byte := _BYTE_TOKEN.fullmatch(name):
      return bytes([int(byte[1], 16)])
    if _BROKEN in name:
      return text.encode()
    raise ValueError(
        f'tokenizer {self._tokenizer.name_or_path!r}: token {token_id} '
        f'({name!r}) is part of a character and not spelt <0xHH>, so the '
        'text of a response cannot be told token by token; use a tokenizer '
        "with byte fallback, such as Gemma's, or a macro.termination that "
        'does not read text'
    )

  def __call__(self, ids: Sequence[int]) -> Spelling:
    """The text of `ids` and where each of them stands in it."""
    pieces = [self._piece(int(i)) for i in ids]
    sizes = np.array([len(piece) for piece in pieces], int)
    text, character = character_of_byte(b''.join(pieces))
    ends = np.cumsum(sizes)
    # A token without bytes stands behind all characters begun before it.
    behind = np.concatenate([[0], character + 1])
    at = np.concatenate([character, [len(text)]])
    begins = np.where(sizes > 0, at[ends - sizes], behind[ends])
    return Spelling(text, begins, behind[ends])


def first_characters(spelling: Spelling) -> np.ndarray:
  """int [T]: offset of each token's first non-blank character; -1 = none."""
  blank = np.array([char.isspace() for char in spelling.text], bool)
  solid = np.append(np.flatnonzero(~blank), len(spelling.text))
  first = solid[np.searchsorted(solid, spelling.begins)]
  return np.where(first < spelling.ends, first, -1)


def starts(spelling: Spelling, boundaries: Sequence[int]) -> np.ndarray:
  """bool [T]: the tokens that open a macro action.

  A token opens one if its first non-blank character stands at a boundary:
  blanks and newlines belong to the token before, and a boundary within a token
  is dropped, because no cut is possible there. Token 0 opens in any case, so
  that the first word after leading blanks need not.

  Args:
    spelling: a response.
    boundaries: offsets of characters, in any order.
  """
  first = first_characters(spelling)
  # Of tokens that share a character only the first can open there.
  before = np.maximum.accumulate(np.append(-1, first[:-1]))[: len(first)]
  wanted = np.isin(first, np.asarray(boundaries, int))
  opens = wanted & (first > before) & (before >= 0)
  opens[:1] = True
  return opens
