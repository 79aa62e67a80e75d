"""Models that are finished: found by name, checked, loaded for use.

A name is a Hugging Face folder, a hub id, or a workdir; see
`training.products`.
"""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

import jax

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import heads, huggingface, presets
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.parallel.mesh import AXES
from ma_rlhf_jax.structs import Params
from ma_rlhf_jax.training import automatic, model_configs, products
from ma_rlhf_jax.training.products import SourceError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# Flag -> kind of model, and its role.
_ROLES = {
    'model': ('policy', 'policy'),
    'reward_model': ('scalar', 'reward model'),
}


@dataclasses.dataclass(frozen=True)
class Finished:
  """A model whose folder, config and tensors were checked; nothing is loaded.

  Attributes:
    name: the flag and its value, for messages.
    folder: local.
    source: what the name stands for, a stage of a workdir for example.
    kind: 'policy' or 'scalar'.
    shape: in the dtype in which it is computed.
    tokenizer: of the folder; None where a reward model has none.
  """

  name: str
  folder: pathlib.Path
  source: products.Source
  kind: str
  shape: presets.GemmaConfig
  tokenizer: 'PreTrainedTokenizerBase | None'

  def describe(self) -> str:
    """`--model=runs/x: its stage ppo, runs/x/ppo/hf, 2,506 parameters, ...`."""
    size = f'{self.shape.num_params:,} parameters, {self.shape.dtype}'
    source = self.source
    made = f'its stage {source.stage}, {source.path}, ' if source.stage else ''
    return f'{self.name}: {made}{size}'

  def load(self) -> Params:
    """The parameters, on the mesh of `jax.set_mesh`."""
    try:
      return huggingface.load_params(self.folder, self.shape, self.kind)
    except (ValueError, OSError) as error:
      raise SourceError(f'{self.name}: {error}') from error


def _tokenizer(
    folder: pathlib.Path, kind: str
) -> 'PreTrainedTokenizerBase | None':
  if kind == 'scalar' and not tokenizer_lib.has_vocabulary(str(folder)):
    return None
  return tokenizer_lib.load_tokenizer(str(folder))


def find(flag: str, value: str, dtype: str) -> Finished:
  """The model that a flag names; no weight is read.

  Args:
    flag: 'model' or 'reward_model'.
    value: a folder, a hub id (which is fetched) or a workdir.
    dtype: of weights and matmuls.

  Raises:
    SourceError: if it cannot be used, with the flag and the reason.
  """
  kind, role = _ROLES[flag]
  name = f'--{flag}={value}'
  source = products.locate(f'--{flag}', value, role)
  model = automatic.fixed(config_lib.base()).model
  model.update({'dtype': dtype, 'remat': 'none'})
  try:
    folder = huggingface.resolve(source.path)
    shape = model_configs.frozen(huggingface.read_shape(folder), model)
    huggingface.check_params(folder, shape, kind)
    tokenizer = _tokenizer(folder, kind)
  except (ValueError, OSError) as error:
    raise SourceError(f'{name}: {error}') from error
  return Finished(name, folder, source, kind, shape, tokenizer)


def check_pair(policy: Finished, reward_model: Finished | None) -> None:
  """Raises SourceError where embeddings and tokenizers do not fit together."""
  size = len(policy.tokenizer)
  for model in filter(None, (policy, reward_model)):
    if model.shape.vocab_size < size:
      raise SourceError(
          f'{model.name}: the embedding has {model.shape.vocab_size} rows, '
          f'fewer than the {size} entries of the tokenizer in {policy.folder}; '
          'name a model whose tokenizer it is'
      )
  if reward_model is None or reward_model.tokenizer is None:
    return
  ours, theirs = (
      tokenizer_lib.fingerprint(model.tokenizer)
      for model in (policy, reward_model)
  )
  if ours != theirs:
    raise SourceError(
        f'{reward_model.name}: its tokenizer differs from that of '
        f'{policy.name}, so it cannot read the responses; name a reward model '
        'with the same tokenizer'
    )


def make_mesh(tensor: int) -> jax.sharding.Mesh:
  """All local devices: `tensor` share each weight, the rest split the rows."""
  devices = jax.local_devices()
  if len(devices) % tensor:
    raise SourceError(
        f'--tensor={tensor} does not divide the {len(devices)} devices'
    )
  shape = (len(devices) // tensor, 1, tensor)
  kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)


def check_mesh(model: Finished, tensor: int) -> None:
  """Raises SourceError where the mesh of `jax.set_mesh` cannot split it."""
  abstract = heads.abstract_params(model.kind, model.shape)
  if uneven := partition.indivisible(abstract):
    raise SourceError(
        f'--tensor={tensor} does not split {model.name}: {"; ".join(uneven)}; '
        'give a smaller one'
    )
