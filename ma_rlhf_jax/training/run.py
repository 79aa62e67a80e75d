"""What every stage of a run shares."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import TYPE_CHECKING, Any

from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.data.encoding import EncodedSet
from ma_rlhf_jax.data.parts import Datasets
from ma_rlhf_jax.macro.host import NAMES, HostSettings, HostTermination
from ma_rlhf_jax.parallel.mesh import own_rows, place
from ma_rlhf_jax.scorers.functions import TextReward
from ma_rlhf_jax.training.spec import Spec

if TYPE_CHECKING:  # transformers takes seconds to import
  from transformers import PreTrainedTokenizerBase


# What reward functions are told of a row.
_OF_ROW = ('prompt', 'chosen', 'rejected')


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

  @property
  def spec(self) -> Spec:
    """What its programs are made from."""
    return Spec(
        self.config,
        self.mesh,
        self.prompt_len,
        self.response_len,
        self.tokenizer.pad_token_id,
        self.tokenizer.eos_token_id,
    )

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

  def text_reward(self, data: EncodedSet) -> Callable[..., np.ndarray] | None:
    """What the reward functions of the config give responses to rows of `data`.

    Returns:
      (rows [B], tokens_BT, mask_BT) -> float32 [B], reward-model units; None
      where there is no function.
    """
    reward = TextReward.from_config(self.config)
    if reward is None:
      return None

    def score(
        rows: np.ndarray, tokens_BT: np.ndarray, mask_BT: np.ndarray
    ) -> np.ndarray:
      given = [
          {name: self.text(getattr(data, name)[row]) for name in _OF_ROW}
          for row in np.asarray(rows).tolist()
      ]
      responses = [
          self.text(tokens[mask])
          for tokens, mask in zip(
              np.asarray(tokens_BT), np.asarray(mask_BT), strict=True
          )
      ]
      return reward([row.pop('prompt') for row in given], responses, given)

    return score

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
