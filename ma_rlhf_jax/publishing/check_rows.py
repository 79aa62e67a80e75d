"""The rows of tokens that an export is checked with."""

import json
from typing import TYPE_CHECKING

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data import encoding, tasks
from ma_rlhf_jax.data import tokenizer as tokenizer_lib

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

NUM_ROWS = 8
Rows = list[list[int]]


class PromptsError(ValueError):
  """There are no prompts to check an export with."""


def held_out(
    config: ConfigDict, tokenizer: 'PreTrainedTokenizerBase', kind: str
) -> Rows:
  """The first held-out prompts of a run; for scores with their responses.

  Raises:
    PromptsError: if the rows of the run cannot be read.
  """
  prompt_len, response_len = config_lib.lengths(config)
  try:
    _, examples, _ = tasks.load_examples(config)
    encoded, _ = encoding.encode_examples(
        examples[: 8 * NUM_ROWS],
        tokenizer,
        prompt_len=prompt_len,
        response_len=response_len,
    )
  except (ValueError, OSError) as error:
    raise PromptsError(
        f'{error}; an export is checked on held-out prompts: restore the rows '
        'of the run, or give prompts by --prompts=FILE'
    ) from error
  if not len(encoded):
    raise PromptsError(
        f'none of the held-out prompts fits {prompt_len} tokens; give others '
        'by --prompts=FILE'
    )
  rows = range(min(NUM_ROWS, len(encoded)))
  answer = lambda i: encoded.chosen[i].tolist() if kind == 'scalar' else []
  return [encoded.prompt[i].tolist() + answer(i) for i in rows]


def of_file(path: str, tokenizer: 'PreTrainedTokenizerBase', kind: str) -> Rows:
  """The first rows of a JSONL file: `prompt`, and for scores `response`.

  Raises:
    PromptsError: with the line that is no such row.
  """
  try:
    lines = epath.Path(path).expanduser().read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise PromptsError(f'--prompts={path} cannot be read: {error}') from error
  columns = ('prompt', 'response') if kind == 'scalar' else ('prompt',)
  rows = []
  for number, line in enumerate(lines[:NUM_ROWS], 1):
    try:
      texts = [json.loads(line)[column] for column in columns]
      ids = tokenizer_lib.encode_batch(tokenizer, texts)
    except (ValueError, KeyError, TypeError) as error:
      raise PromptsError(
          f'--prompts={path}, line {number}: needs a JSON object with the '
          f'texts {" and ".join(columns)}: {error!r}'
      ) from error
    end = [tokenizer.eos_token_id] if kind == 'scalar' else []
    rows.append([tokenizer.bos_token_id, *sum(ids, []), *end])
  if not rows:
    raise PromptsError(f'--prompts={path} holds no rows')
  return rows
