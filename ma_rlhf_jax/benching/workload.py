"""A PPO stage on random weights and prompts, at the shape of a recipe."""

import dataclasses
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data.encoding import EncodedSet, Ragged
from ma_rlhf_jax.data.parts import Datasets
from ma_rlhf_jax.models import heads, presets
from ma_rlhf_jax.parallel.mesh import make_mesh, place
from ma_rlhf_jax.structs import PromptBatch
from ma_rlhf_jax.training import automatic
from ma_rlhf_jax.training.experience import Models
from ma_rlhf_jax.training.ppo import PPO
from ma_rlhf_jax.training.run import Run

# Mean tokens of prompts and responses of HH rows, of 512 + 512.
_HH_MEANS = (150, 100)


@dataclasses.dataclass(frozen=True)
class Ids:
  """The special tokens of a vocabulary without texts."""

  size: int
  pad_token_id: int
  eos_token_id: int
  bos_token_id: int = 2

  def __len__(self) -> int:
    return self.size

  @property
  def all_special_ids(self) -> list[int]:
    """Those that no text holds."""
    return [self.pad_token_id, self.eos_token_id, self.bos_token_id]


def lengths(
    spread: str, rows: int, prompt_len: int, response_len: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Real tokens [B] of prompts and of responses.

  Args:
    spread: `full`: every column; `hh`: exponential about the means of HH rows,
      150 + 100 of 512 + 512, cut at the columns.
    rows: B.
    prompt_len: P.
    response_len: T.
    seed: of the draws.
  """
  if spread == 'full':
    return np.full(rows, prompt_len), np.full(rows, response_len)
  random = np.random.default_rng(seed)

  def drawn(mean: float, columns: int) -> np.ndarray:
    draws = random.exponential(mean * columns / 512, size=rows)
    return np.clip(np.rint(draws), 8 if columns > 8 else 1, columns).astype(int)

  return drawn(_HH_MEANS[0], prompt_len), drawn(_HH_MEANS[1], response_len)


@dataclasses.dataclass
class Workload:
  """What is measured.

  Attributes:
    stage: a PPO stage.
    states: what it trains.
    prompt_lengths: real tokens [B] of the prompts.
    response_lengths: tokens [B] after which responses are cut.
  """

  stage: PPO
  states: dict[str, Any]
  prompt_lengths: np.ndarray
  response_lengths: np.ndarray

  def prompts(self, index: int, tokens_BP: np.ndarray | None = None) -> Any:
    """The prompts of one iteration, on the devices."""
    run = self.stage.run
    rows, width = run.rows, run.prompt_len
    if tokens_BP is None:
      random = np.random.default_rng((0, index))
      tokens_BP = random.integers(3, len(run.tokenizer), (rows, width))
    mask_BP = np.arange(width) >= width - self.prompt_lengths[:, None]
    ids_B = np.arange(rows, dtype=np.int32) + index * rows
    return place(
        PromptBatch(
            tokens_BP=np.where(mask_BP, tokens_BP, 0).astype(np.int32),
            mask_BP=mask_BP,
            prompt_ids_B=ids_B,
            sample_ids_B=np.zeros(rows, np.int32),
            limits_B=self.response_lengths.astype(np.int32),
        ),
        run.mesh,
    )


def make_run(config: ConfigDict) -> tuple[Run, presets.GemmaConfig]:
  """A run without rows worth reading, and the shape of its models."""
  shape = presets.from_fields(config.model, config.tokenizer.vocab_size)
  prompt_len, response_len = config_lib.lengths(config)
  rows = config.ppo.batch_size * config.ppo.samples_per_prompt
  empty = Ragged.of([[3]] * rows)
  none = np.zeros(rows, bool)
  data = EncodedSet(empty, empty, empty, none, none)
  mesh = make_mesh(config.mesh)
  config = config_lib.restore(config_lib.flatten(config))
  config.stages = ('ppo',)  # whose sizes count
  config = automatic.resolve(
      config,
      shape,
      prompt_len=prompt_len,
      response_len=response_len,
      platform=mesh.devices.flat[0].platform,
  )
  run = Run(
      config=config,
      workdir=epath.Path('unused'),
      mesh=mesh,
      data=Datasets(data, data, data, data, counts={}),
      # Ids that cannot be drawn, so that lengths are those that are asked for.
      tokenizer=Ids(shape.vocab_size, shape.vocab_size, shape.vocab_size + 1),
      prompt_len=prompt_len,
      response_len=response_len,
      gold=None,
  )
  return run, shape


def make(config: ConfigDict, spread: str = 'full') -> Workload:
  """A stage on random weights; call it, and use it, under `jax.set_mesh`.

  Args:
    config: a recipe; its preset, lengths, batch sizes and dtypes count.
    spread: see `lengths`.
  """
  run, shape = make_run(config)
  config = run.config
  learns, fixed = presets.trained(shape, config), presets.frozen(
      shape, config.model
  )
  shapes = Models(learns, fixed, learns, fixed)
  draw = lambda number, shape: heads.init_params(
      'policy', shape, jax.random.key(number)
  )
  scored = lambda number, shape: {
      'backbone': draw(number, shape),
      'head': heads.init_head(shape, jax.random.key(number)),
  }
  params = Models(
      draw(0, learns), draw(1, fixed), scored(2, learns), scored(3, fixed)
  )
  stage = PPO(run, shapes, params)
  del params
  states, stage.states = stage.states, {}  # steps donate them
  return Workload(
      stage,
      states,
      *lengths(spread, run.rows, run.prompt_len, run.response_len)
  )
