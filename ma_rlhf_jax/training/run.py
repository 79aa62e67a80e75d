"""What every stage of a run shares."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import TYPE_CHECKING, Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import masking
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.data.encoding import EncodedSet
from ma_rlhf_jax.data.parts import Datasets
from ma_rlhf_jax.macro.host import NAMES, HostSettings, HostTermination
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.mesh import abstract, own_rows, place
from ma_rlhf_jax.rollout.decode import SamplingSettings
from ma_rlhf_jax.rollout.layout import DecodeLayout, make_layout
from ma_rlhf_jax.structs import (
    Array,
    PromptBatch,
    Rollout,
    Scored,
    SequenceBatch,
)

if TYPE_CHECKING:  # transformers takes seconds to import
  from transformers import PreTrainedTokenizerBase

# Each purpose draws from a stream of its own; see `Run.key`.
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
)


@dataclasses.dataclass(frozen=True)
class Setup:
  """What is known of a run before a row is read.

  Attributes:
    config: the resolved config.
    workdir: where everything is written.
    mesh: the devices.
    tokenizer: of policy and reward model.
  """

  config: ConfigDict
  workdir: epath.Path
  mesh: Mesh
  tokenizer: 'PreTrainedTokenizerBase'


@dataclasses.dataclass(frozen=True)
class Run(Setup):
  """A workdir with its config, data and devices.

  Attributes:
    data: tokenised rows of each stage and of the evaluation.
    prompt_len: P, prompt columns.
    response_len: T, response columns.
    gold: true quality of (prompt, response), for tasks that know it.
  """

  data: Datasets
  prompt_len: int
  response_len: int
  gold: Callable[[str, str], float] | None

  def key(self, stream: str) -> Array:
    """The random key of one stream; folded with a step before use."""
    root = jax.random.key(self.config.seed)
    return jax.random.fold_in(root, _STREAMS.index(stream))

  @property
  def logprob_temperature(self) -> float:
    """Temperature of log-probs in ratio, KL and perplexity."""
    c = self.config
    return c.ppo.logprob_temperature or c.rollout.temperature

  @property
  def rows(self) -> int:
    """Sequences of one PPO step, and of one batch of an evaluation."""
    return self.config.ppo.batch_size * self.config.ppo.samples_per_prompt

  def batch(
      self,
      make: Callable[..., Any],
      data: EncodedSet,
      rows: Sequence[int],
      size: int | None = None,
  ) -> Any:
    """`make` (a batch maker of `data.batches`) of rows, on the devices.

    Each process makes no more than the rows of its own devices.

    Args:
      make: `sft_batch` or `pair_batch`.
      data: where the rows are.
      rows: their indices.
      size: rows of the result; what is missing is filled with empty rows.
    """
    rows = np.asarray(rows)
    size = size or len(rows)
    own = own_rows(self.mesh, size)
    made = make(
        data,
        rows[own[own < len(rows)]],
        prompt_len=self.prompt_len,
        response_len=self.response_len,
        pad_id=self.tokenizer.pad_token_id,
    )
    missing = int(np.sum(own >= len(rows)))  # all of them come last
    fill = lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return place(jax.tree.map(fill, made), self.mesh, size)

  def abstract_sequences(self, rows: int) -> SequenceBatch:
    """Shapes of a batch of whole sequences, as they lie on the devices."""
    length = self.prompt_len + self.response_len
    array = lambda width, dtype: jax.ShapeDtypeStruct((rows, width), dtype)
    batch = SequenceBatch(
        tokens_BL=array(length, np.int32),
        mask_BL=array(length, bool),
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

  def held_out(self, make: Callable[..., Any], size: int) -> Iterator[Any]:
    """The held-out rows in batches of `size`, the last one filled up."""
    total = len(self.data.eval)
    for start in range(0, total, size):
      rows = range(start, min(start + size, total))
      yield self.batch(make, self.data.eval, rows, size)

  def text(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of token ids, special tokens left out."""
    special = set(self.tokenizer.all_special_ids)
    plain = [
        token for token in np.asarray(ids).tolist() if token not in special
    ]
    return tokenizer_lib.decode(self.tokenizer, plain)

  def sampling(self, temperature: float | None = None) -> SamplingSettings:
    """How responses are drawn, at the rollout's temperature or another."""
    r = self.config.rollout
    return SamplingSettings(
        max_new_tokens=self.response_len,
        temperature=r.temperature if temperature is None else temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_new_tokens=r.min_new_tokens,
        eos_id=self.tokenizer.eos_token_id,
        pad_id=self.tokenizer.pad_token_id,
        int8_cache=r.int8_cache,
    )

  def decode_layout(self, shape: GemmaConfig) -> DecodeLayout:
    """How a policy of this shape lies while it decodes."""
    c = self.config
    rows = c.ppo.batch_size * c.ppo.samples_per_prompt
    return make_layout(
        shape,
        self.mesh,
        c.rollout.tensor,
        rows=c.rollout.batch_size or rows,
        columns=self.prompt_len + self.response_len,
    )

  def host_termination(self) -> HostTermination | None:
    """The rule of the host that the config names; None = one of the device.

    Raises:
      ValueError, ImportError, OSError: if the rule cannot work, with the field.
    """
    m = self.config.macro
    if m.termination not in NAMES:
      return None
    fields = dataclasses.fields(HostSettings)
    settings = HostSettings(**{field.name: m[field.name] for field in fields})
    return HostTermination(settings, self.tokenizer)
