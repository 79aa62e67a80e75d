"""A response while it is drawn, as text that never shows half a character."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.generation import batching
from ma_rlhf_jax.generation.responses import Models, row_keys
from ma_rlhf_jax.parallel.mesh import place
from ma_rlhf_jax.rollout import decode

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_STEP = 2  # tokens drawn between two looks at them
# What decoding gives for bytes that are no character, or not yet.
_BROKEN = '\ufffd'

_start = jax.jit(decode.start, static_argnums=(0, 4))
# The state is given up: its cache can be as large as the model.
_extend = jax.jit(decode.extend, static_argnums=(0, 3), donate_argnums=2)


def plain_text(tokenizer: 'PreTrainedTokenizerBase', ids: Sequence[int]) -> str:
  """The text of token ids, special tokens left out."""
  special = set(tokenizer.all_special_ids)
  return tokenizer_lib.decode(tokenizer, [i for i in ids if i not in special])


class TextStream:
  """Tokens in, as they come; text out, as soon as nothing can change it.

  A character may be spelt in up to four byte tokens, and the text that ends a
  response may come in pieces too: both are held back until they are whole.

  Attributes:
    stopped: whether the text that ends a response has come.
  """

  def __init__(self, tokenizer: 'PreTrainedTokenizerBase', stop: str = ''):
    """Nothing has come yet.

    Args:
      tokenizer: spells the tokens.
      stop: text that ends a response and is no part of it; '' = none.
    """
    self.stopped = False
    self._tokenizer, self._stop = tokenizer, stop
    self._ids: list[int] = []
    self._told = 0  # characters given out

  def push(self, ids: Sequence[int]) -> str:
    """The text that has become sure with these tokens."""
    self._ids += ids
    text = self._text()
    return self._new(text if self.stopped else self._sure(text))

  def finish(self) -> str:
    """What was held back, now that no token follows."""
    return self._new(self._text())

  def _text(self) -> str:
    text = plain_text(self._tokenizer, self._ids)
    at = text.find(self._stop) if self._stop else -1
    self.stopped = at >= 0
    return text[:at] if self.stopped else text

  def _sure(self, text: str) -> str:
    text = text.rstrip(_BROKEN)
    for size in range(min(len(text), len(self._stop) - 1), 0, -1):
      if text.endswith(self._stop[:size]):
        return text[:-size]
    return text

  def _new(self, text: str) -> str:
    new = text[self._told :]
    self._told += len(new)
    return new


def stream(
    models: Models,
    prompt: Sequence[int],
    settings: decode.SamplingSettings,
    *,
    seed: int,
) -> Iterator[list[int]]:
  """Yields the tokens of one response, a few at a time, EOS included.

  They are those of `responses.respond` with the same arguments.

  Args:
    models: the policy, under `jax.set_mesh` of its mesh.
    prompt: its ids, BOS first.
    settings: how to sample.
    seed: of the draws, in [0, 2^32).
  """
  shape, params = models.policy
  batch = batching.Batch(batching.width(len(prompt)), [batching.Item(0, 0)])
  host = batching.prompt_batch(
      batch,
      [prompt],
      batching.prompt_keys([prompt]),
      rows=models.multiple,
      pad_id=settings.pad_id,
  )
  prompts = place(host, models.mesh)
  keys_B = row_keys(jax.random.key(seed), prompts)
  state = _start(shape, params, prompts, keys_B, settings)
  told = 0
  while True:
    tokens_BT, mask_BT = jax.device_get((state.tokens_BT, state.mask_BT))
    ids = tokens_BT[0][mask_BT[0]].tolist()
    yield ids[told:]
    told = len(ids)
    if told == settings.max_new_tokens or ids[-1] == settings.eos_id:
      return
    more = min(_STEP, settings.max_new_tokens - told)
    state = _extend(shape, params, state, settings, more)


def speak(
    models: Models,
    tokenizer: 'PreTrainedTokenizerBase',
    prompt: Sequence[int],
    settings: decode.SamplingSettings,
    *,
    seed: int,
    stop: str = '',
) -> Iterator[str]:
  """Yields the text of one response, piece by piece; see `stream`.

  Args:
    models: the policy, under `jax.set_mesh` of its mesh.
    tokenizer: spells the tokens.
    prompt: its ids, BOS first.
    settings: how to sample.
    seed: of the draws, in [0, 2^32).
    stop: text that ends the response and is no part of it; '' = none.
  """
  text = TextStream(tokenizer, stop)
  for ids in stream(models, prompt, settings, seed=seed):
    if piece := text.push(ids):
      yield piece
    if text.stopped:
      return
  if piece := text.finish():
    yield piece
