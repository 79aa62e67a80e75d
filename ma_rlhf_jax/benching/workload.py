"""PPO on random weights and prompts, at the shape of a recipe."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.models import heads, presets
from ma_rlhf_jax.parallel.mesh import make_mesh, place
from ma_rlhf_jax.ppo.programs import Programs
from ma_rlhf_jax.structs import Models, PromptBatch
from ma_rlhf_jax.training import automatic, model_configs
from ma_rlhf_jax.training.spec import Spec

# Mean tokens of prompts and responses of HH rows, of 512 + 512.
_HH_MEANS = (150, 100)


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
    programs: of a PPO step.
    states: what it trains.
    vocab_size: token ids that prompts hold.
    prompt_lengths: real tokens [B] of the prompts.
    response_lengths: tokens [B] after which responses are cut.
  """

  programs: Programs
  states: dict[str, Any]
  vocab_size: int
  prompt_lengths: np.ndarray
  response_lengths: np.ndarray

  def prompts(self, index: int, tokens_BP: np.ndarray | None = None) -> Any:
    """The prompts of one iteration, on the devices."""
    spec = self.programs.spec
    rows, width = spec.rows, spec.prompt_len
    if tokens_BP is None:
      random = np.random.default_rng((0, index))
      tokens_BP = random.integers(3, self.vocab_size, (rows, width))
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
        spec.mesh,
    )


def make_spec(config: ConfigDict) -> tuple[Spec, presets.GemmaConfig]:
  """What the programs of a recipe are made from; the shape of its models."""
  shape = presets.from_config(config.model, config.tokenizer.vocab_size)
  prompt_len, response_len = config_lib.lengths(config)
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
  # Ids that cannot be drawn, so that lengths are those that are asked for.
  pad_id, eos_id = shape.vocab_size, shape.vocab_size + 1
  return Spec(config, mesh, prompt_len, response_len, pad_id, eos_id), shape


def make(config: ConfigDict, spread: str = 'full') -> Workload:
  """Programs with random weights; call it, and use it, under `jax.set_mesh`.

  Args:
    config: a recipe; its preset, lengths, batch sizes and dtypes count.
    spread: see `lengths`.
  """
  spec, shape = make_spec(config)
  config = spec.config
  learns, fixed = model_configs.trained(shape, config), model_configs.frozen(
      shape, config.model
  )
  configs = Models(learns, fixed, learns, fixed)
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
  num_steps = config_lib.num_steps(config.ppo, spec.rows)
  programs = Programs(spec, configs, params, num_steps)
  return Workload(
      programs,
      programs.init_states(params),
      shape.vocab_size,
      *lengths(spread, spec.rows, spec.prompt_len, spec.response_len),
  )
