"""What the programs of a run are made from: no rows, tokenizer or workdir."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import masking
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.mesh import abstract
from ma_rlhf_jax.rollout.decode import SamplingSettings
from ma_rlhf_jax.rollout.layout import DecodeLayout, make_layout
from ma_rlhf_jax.structs import (
    Array,
    PromptBatch,
    Rollout,
    Scored,
    SequenceBatch,
)

# Each purpose draws from a stream of its own; see `Spec.key`.
_STREAMS = (
    'init_sft',
    'init_reward_model',
    'rollout',
    'macro',
    'minibatches',
    'evaluate',
    'compare_sft',
    'compare_ppo',
    'adapters_sft',
    'adapters_reward_model',
    'adapters_policy',
    'adapters_critic',
    'init_critic',
)


class Program(NamedTuple):
  """A jitted function and `jax.ShapeDtypeStruct` trees of its arguments."""

  function: Callable[..., Any]
  args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Spec:
  """Config, devices, lengths and token ids of a run.

  Attributes:
    config: the resolved config.
    mesh: the devices; they need not be here for programs to be compiled.
    prompt_len: P, prompt columns.
    response_len: T, response columns.
    pad_id: of padding.
    eos_id: ends a response.
  """

  config: ConfigDict
  mesh: Mesh
  prompt_len: int
  response_len: int
  pad_id: int
  eos_id: int

  def key(self, stream: str) -> Array:
    """The random key of one stream; folded with a step before use."""
    root = jax.random.key(self.config.seed)
    return jax.random.fold_in(root, _STREAMS.index(stream))

  @property
  def length(self) -> int:
    """L, columns of prompt and response."""
    return self.prompt_len + self.response_len

  @property
  def logprob_temperature(self) -> float:
    """Temperature of log-probs in ratio, KL and perplexity."""
    c = self.config
    return c.ppo.logprob_temperature or c.rollout.temperature

  @property
  def rows(self) -> int:
    """Sequences of one PPO step, and of one batch of an evaluation."""
    return self.config.ppo.batch_size * self.config.ppo.samples_per_prompt

  @property
  def batch_devices(self) -> int:
    """Devices that share the rows of a batch."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']

  def sampling(self, temperature: float | None = None) -> SamplingSettings:
    """How responses are drawn, at the rollout's temperature or another."""
    r = self.config.rollout
    return SamplingSettings(
        max_new_tokens=self.response_len,
        temperature=r.temperature if temperature is None else temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_new_tokens=r.min_new_tokens,
        eos_id=self.eos_id,
        pad_id=self.pad_id,
        int8_cache=r.int8_cache,
    )

  def decode_layout(self, config: GemmaConfig) -> DecodeLayout:
    """How a policy lies on the devices while it decodes."""
    r = self.config.rollout
    return make_layout(
        config,
        self.mesh,
        r.tensor,
        rows=r.batch_size or self.rows,
        columns=self.length,
    )

  def abstract_sequences(self, rows: int) -> SequenceBatch:
    """Shapes of a batch of whole sequences, as they lie on the devices."""
    array = lambda width, dtype: jax.ShapeDtypeStruct((rows, width), dtype)
    batch = SequenceBatch(
        tokens_BL=array(self.length, np.int32),
        mask_BL=array(self.length, bool),
        response_mask_BT=array(self.response_len, bool),
    )
    return abstract(batch, self.mesh)

  def abstract_prompts(self, rows: int) -> PromptBatch:
    """Shapes of a batch of prompts, as they lie on the devices."""
    array = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), np.int32)
    mask = jax.ShapeDtypeStruct((rows, self.prompt_len), bool)
    ids = array()
    batch = PromptBatch(array(self.prompt_len), mask, ids, ids)
    return abstract(batch, self.mesh)

  def abstract_rollout(self, rows: int) -> tuple[Rollout, Scored]:
    """Shapes of so many responses and of their scores, on the devices."""
    dtype = masking.wide(jnp.dtype(self.config.model.dtype))
    floats = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), dtype)
    made = floats(self.response_len)
    scored = abstract(Scored(made, made, made, made, floats()), self.mesh)
    drawn = abstract((made, made), self.mesh)
    return Rollout(self.abstract_sequences(rows), *drawn), scored
