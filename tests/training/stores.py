"""Models on disk, for the tests of who starts from which."""

import dataclasses
import pathlib
from typing import Any

from ml_collections import ConfigDict

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import exporting, presets
from ma_rlhf_jax.training.run import Run
from tests import tiny
from tests.hashing import params_sha256
from tests.models.drawn import draw

SHAPE = dataclasses.replace(tiny.SHAPE, vocab_size=310, num_layers=1)
MODEL = {
    f'model__{name}': getattr(SHAPE, name)
    for name in presets.SHAPE_FIELDS
    if name != 'sliding_layers'  # follows from the window
}


@dataclasses.dataclass(frozen=True)
class Store:
  """Models on disk.

  Attributes:
    policy: a Hugging Face folder.
    scalar: a Hugging Face folder of a reward model.
    foreign: a policy with another tokenizer.
    workdir: a run whose SFT and reward model are done, and nothing more.
    finished: a run whose PPO is done too.
    tokenizer: of all but `foreign`.
    larger: a tokenizer of more entries.
  """

  policy: str
  scalar: str
  foreign: str
  workdir: str
  finished: str
  tokenizer: Any
  larger: Any


def _tokenizer(folder: pathlib.Path, text: str, size: int) -> Any:
  tokenizer_lib.train_tokenizer([text] * 4, size, str(folder))
  return tokenizer_lib.load_tokenizer(str(folder))


def make_store(root: pathlib.Path) -> Store:
  """The models, saved below a folder."""
  tokenizer = _tokenizer(root / 'ours', 'the boat and the goat', 300)
  other = _tokenizer(root / 'theirs', 'a quick brown fox', 300)
  text = 'the quick brown fox jumps over the lazy dogs and back to the goat 123'
  larger = _tokenizer(root / 'larger', text, 340)
  assert len(larger) > SHAPE.vocab_size >= max(len(tokenizer), len(other))

  def save(path: str, kind: str, seed: int, words: Any = tokenizer) -> str:
    exporting.save(root / path, draw(kind, SHAPE, seed), SHAPE, kind, words)
    return str(root / path)

  for name in ('workdir', 'finished'):
    workdir_lib.open_workdir(root / name, tiny.config())
    save(f'{name}/sft/hf', 'policy', 1)
    save(f'{name}/reward_model/hf', 'scalar', 2)
    for stage in ('sft', 'reward_model'):
      workdir_lib.mark_done(root / name, stage, {'step': 1})
  workdir_lib.mark_done(root / 'finished', 'ppo', {'step': 1})
  return Store(
      policy=save('policy', 'policy', 3),
      scalar=save('scalar', 'scalar', 4),
      foreign=save('foreign', 'policy', 5, other),
      workdir=str(root / 'workdir'),
      finished=str(root / 'finished'),
      tokenizer=tokenizer,
      larger=larger,
  )


def store_config(store: Store, **fields: str) -> ConfigDict:
  """A config in which each field names an entry of the store."""
  named = {name: getattr(store, entry) for name, entry in fields.items()}
  return tiny.config(**MODEL, **named)


def store_run(store: Store, tmp_path: pathlib.Path, **fields: str) -> Run:
  made = store_config(store, **fields)
  return tiny.run(tmp_path, made, tokenizer=store.tokenizer)


def sha256(kind: str, seed: int) -> str:
  return params_sha256(draw(kind, SHAPE, seed))
