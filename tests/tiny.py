"""A tiny Gemma and a few ragged rows, shared by the tests of later rooms."""

from collections.abc import Callable
import dataclasses
import math
import pathlib
from typing import Any

from etils import epath
import jax
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data import batches
from ma_rlhf_jax.data.encoding import EncodedSet, Ragged
from ma_rlhf_jax.data.parts import Datasets
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.objective.advantage import Objective
from ma_rlhf_jax.parallel.mesh import AXES
from ma_rlhf_jax.structs import Params, PromptBatch, SequenceBatch
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.spec import Spec
from tests import tolerance
from tests.models.drawn import draw

PAD, EOS, BOS = 0, 1, 2
# All sizes differ, and heads * head_dim is not the width.
SHAPE = GemmaConfig(
    vocab_size=20,
    num_layers=2,
    embed_dim=16,
    mlp_dim=22,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
    remat='none',
    logprob_chunk=8,
)
# Columns of prompts and of responses; no row fills both.
PROMPT_LEN, RESPONSE_LEN = 6, 8
_PROMPTS = (3, 6, 2, 5, 1, 4, 6, 2)  # tokens in each row
_RESPONSES = (5, 7, 8, 1, 3, 8, 2, 6)


def params(kind: str, seed: int) -> Params:
  """Weights under which responses differ: embeddings of std 0.1."""
  drawn = draw(kind, SHAPE, seed)
  backbone = drawn if kind == 'policy' else drawn['backbone']
  backbone['embedding'] = backbone['embedding'] * 2
  return drawn


def encoded(seed: int = 0, repeats: int = 1) -> EncodedSet:
  """8 * repeats rows of random tokens: BOS first, EOS last."""
  random = np.random.default_rng(seed)
  draw_ids = lambda size: random.integers(3, SHAPE.vocab_size, size).tolist()
  prompts, chosen, rejected = (
      Ragged.of([[*start, *draw_ids(n - 1), *end] for n in lengths * repeats])
      for lengths, start, end in (
          (_PROMPTS, [BOS], []),
          (_RESPONSES, [], [EOS]),
          (_RESPONSES[::-1], [], [EOS]),
      )
  )
  whole = np.zeros(len(prompts), bool)
  return EncodedSet(prompts, chosen, rejected, whole, whole)


def prompts(
    rows: list[int],
    *,
    width: int = PROMPT_LEN,
    sample_ids: list[int] | None = None,
) -> PromptBatch:
  """The prompts of those rows of `encoded()`, padded to `width`."""
  made = batches.prompt_batch(
      encoded(), rows, prompt_len=width, pad_id=PAD, sample_ids=sample_ids
  )
  return jax.tree.map(jax.numpy.asarray, made)


def sequences(
    rows: list[int], *, width: int = PROMPT_LEN, seed: int = 0, repeats: int = 1
) -> SequenceBatch:
  """Prompts and chosen responses of those rows of `encoded(...)`."""
  made = batches.sft_batch(
      encoded(seed, repeats),
      rows,
      prompt_len=width,
      response_len=RESPONSE_LEN,
      pad_id=PAD,
  )
  return jax.tree.map(jax.numpy.asarray, made)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Says each id as a letter; pad, EOS and BOS as ~, . and ^."""

  pad_token_id: int = PAD
  eos_token_id: int = EOS
  bos_token_id: int = BOS
  name_or_path: str = 'letters'

  @property
  def all_special_ids(self) -> list[int]:
    return [self.pad_token_id, self.eos_token_id, self.bos_token_id]

  def __len__(self) -> int:
    return SHAPE.vocab_size

  def decode(self, ids: list[int], **unused: Any) -> str:
    return ''.join('~.^abcdefghijklmnopq'[i] for i in ids)


def rounding(function: Callable[[Any], Any], weights: Any) -> list[float]:
  """How far what models of `SHAPE` say may be off on any processor.

  Args:
    function: of `weights`, one pass of one or more models.
    weights: the parameters of one, or a tree of those of several.

  Returns:
    One bound for each array that `function` returns, see `tolerance`.
  """
  longest = max(SHAPE.mlp_dim, SHAPE.vocab_size)
  return tolerance.of_sums(function, (weights,), longest)


def mesh(*sizes: int) -> Mesh:
  """A mesh of the first devices, so many along (data, fsdp, tensor)."""
  devices = jax.devices()[: math.prod(sizes)]
  types = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(sizes, AXES, devices=devices, axis_types=types)


def matmuls_are_exact() -> bool:
  """Whether a matmul that is traced here asks for all bits of float32."""
  square = jax.ShapeDtypeStruct((3, 3), np.float32)
  text = jax.jit(lambda x: x @ x).lower(square).as_text()
  return 'HIGHEST' in text


def config(**fields: Any) -> ConfigDict:
  """`base()` for batches of four prompts; `ppo__kl_coef=0.1` sets a field."""
  made = config_lib.base()
  flat = {name.replace('__', '.'): value for name, value in fields.items()}
  defaults = {
      'ppo.batch_size': 4,
      'ppo.steps': 3,
      'ppo.one_pass': 'joint',
      'model.remat': 'full',
      'model.unroll': 1,
      'model.logprob_chunk': 8,
  }
  made.update_from_flattened_dict(defaults | flat)
  return made


def objective(**fields: Any) -> Objective:
  """That of `config()`, some fields changed."""
  made = Objective.from_config(config())
  return dataclasses.replace(made, **fields)


def spec(made: ConfigDict, **fields: Any) -> Spec:
  """What programs of `run('', made)` are made from, some fields changed."""
  return dataclasses.replace(run('', made).spec, **fields)


def run(workdir: pathlib.Path | str, made: ConfigDict, **fields: Any) -> Run:
  """A run on one device over `encoded()`.

  Its gold score is 10 for each letter of the prompt, and 1 for each different
  letter of the response.

  Args:
    workdir: need not exist.
    made: its config.
    **fields: what differs from the defaults, by name of `Run`.
  """
  rows = encoded()
  defaults = {
      'config': made,
      'workdir': epath.Path(workdir),
      'mesh': mesh(1, 1, 1),
      'data': Datasets(rows, rows, rows, rows, counts={}),
      'tokenizer': Tokenizer(),
      'prompt_len': PROMPT_LEN,
      'response_len': RESPONSE_LEN,
      'gold': lambda prompt, response: 10.0 * len(prompt) + len(set(response)),
  }
  return Run(**{**defaults, **fields})
