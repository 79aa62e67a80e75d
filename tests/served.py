"""Models on disk for the tests of generation.

Random ones, whose text depends on all that comes before; and scripted ones,
which say a given text whatever they are asked.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import exporting
from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.structs import Params
from tests import tiny
from tests.models.drawn import draw

WORDS = 'the cat sat on the mat and ran, Human: and Assistant: said so.'
RANDOM = GemmaConfig(
    vocab_size=320,
    num_layers=2,
    embed_dim=20,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
)


@dataclasses.dataclass(frozen=True)
class Store:
  """Models on disk; each has the tokenizer, but for `foreign`.

  Attributes:
    policy: a Hugging Face folder.
    scalar: the same of a reward model.
    foreign: a reward model with another tokenizer.
    workdir: a run whose SFT and reward model are done.
    finished: a run whose PPO is done too.
    tokenizer: of all but `foreign`.
  """

  policy: str
  scalar: str
  foreign: str
  workdir: str
  finished: str
  tokenizer: Any


def train_tokenizer(folder: pathlib.Path, text: str = WORDS) -> Any:
  """A tokenizer of at most 320 entries."""
  tokenizer_lib.train_tokenizer([text] * 4, 310, str(folder))
  return tokenizer_lib.load_tokenizer(str(folder))


def store(root: pathlib.Path) -> Store:
  """Writes the models below `root`."""
  ours = train_tokenizer(root / 'ours')
  other = train_tokenizer(root / 'theirs', 'a quick brown fox')

  def save(path: str, kind: str, seed: int, tokenizer: Any = ours) -> str:
    params = draw(kind, RANDOM, seed)
    exporting.save(root / path, params, RANDOM, kind, tokenizer)
    return str(root / path)

  for name, stages in (
      ('workdir', ('sft', 'reward_model')),
      ('finished', ('sft', 'reward_model', 'ppo')),
  ):
    workdir_lib.open_workdir(root / name, tiny.config())
    for seed, stage in enumerate(stages, 11):
      kind = 'scalar' if stage == 'reward_model' else 'policy'
      save(f'{name}/{stage}/hf', kind, seed)
      workdir_lib.mark_done(root / name, stage, {'step': 1})
  return Store(
      policy=save('policy', 'policy', 3),
      scalar=save('scalar', 'scalar', 4),
      foreign=save('foreign', 'scalar', 5, other),
      workdir=str(root / 'workdir'),
      finished=str(root / 'finished'),
      tokenizer=ours,
  )


def scripted(root: pathlib.Path, tokenizer: Any, prompt: str, say: str) -> str:
  """A policy whose greedy answer to anything that ends as `prompt` is `say`.

  Each token has one successor: embeddings are unit vectors, attention adds
  nothing, and the MLP looks the successor up.
  """
  ask, answer = tokenizer_lib.encode_batch(tokenizer, [prompt, say])
  script = [ask[-1], *answer, tokenizer.eos_token_id]
  assert len(set(script)) == len(script), 'a token has one successor'
  shape = GemmaConfig(
      len(tokenizer), 1, len(tokenizer), len(tokenizer), 1, 1, 2
  )
  params = _look_up(shape, script)
  exporting.save(root / 'scripted', params, shape, 'policy', tokenizer)
  return str(root / 'scripted')


def _look_up(shape: GemmaConfig, script: Sequence[int]) -> Params:
  zeros = lambda x: jnp.zeros(x.shape, x.dtype)
  params = jax.tree.map(zeros, abstract_params('policy', shape))
  unit = jnp.eye(shape.vocab_size)
  params['embedding'] = unit
  mlp = params['layers']['mlp']
  mlp['gate'] = mlp['up'] = unit[None]
  before, after = jnp.asarray(script[:-1]), jnp.asarray(script[1:])
  mlp['down'] = mlp['down'].at[0, before, after].set(1.0)
  return params
