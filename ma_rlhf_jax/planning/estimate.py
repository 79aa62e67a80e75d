"""Memory and traffic of the programs by formula, where no compiler is asked.

For GPUs, and to order what is worth compiling in a search. Bytes of one device;
good to about a third against TPU compiles of 2B to 27B.
"""

import dataclasses
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.models import kernels, presets
from ma_rlhf_jax.parallel import chips, partition
from ma_rlhf_jax.parallel.mesh import mesh_shape
from ma_rlhf_jax.parallel.partition import Machine
from ma_rlhf_jax.rollout import split
from ma_rlhf_jax.training import model_configs


class Load(NamedTuple):
  """What a program takes.

  Attributes:
    temp: bytes of a device that come and go.
    hbm: bytes that a device reads and writes.
    wire: bytes that pass it.
    flops: of all devices.
    waits: seconds of collectives that nothing hides, by their latency.
  """

  temp: float
  hbm: float
  wire: float
  flops: float
  waits: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the formulas are made of.

  Attributes:
    config: of the run.
    shape: of the models.
    chip: of the devices.
    data: devices with rows and weights of their own.
    fsdp: devices that share the weights.
    tensor: devices that share a matrix.
    rows_over: devices that share a batch.
    item: bytes of a number in matmuls.
    fused: no scores of attention are held.
  """

  config: ConfigDict
  shape: presets.GemmaConfig
  chip: chips.Chip
  data: int
  fsdp: int
  tensor: int
  rows_over: int
  item: int
  fused: bool = False

  @classmethod
  def of(
      cls, config: ConfigDict, num_devices: int, chip: chips.Chip
  ) -> 'Sizes':
    """Those of a config on so many devices of a kind."""
    data, fsdp, tensor = mesh_shape(config.mesh, num_devices)
    shape = presets.from_config(config.model, config.tokenizer.vocab_size)
    item = 2 if config.model.dtype == 'bfloat16' else 4
    return cls(config, shape, chip, data, fsdp, tensor, data * fsdp, item)

  @property
  def table(self) -> float:
    """Bytes of the whole embedding on one device."""
    return (
        self.shape.vocab_size * self.shape.embed_dim * self.item / self.tensor
    )

  @property
  def layers(self) -> float:
    """Bytes of all matrices of all layers, gathered over fsdp."""
    s = self.shape
    return (s.num_params - s.vocab_size * s.embed_dim) * self.item / self.tensor

  @property
  def trained(self) -> float:
    """Numbers that learn, on one device."""
    s, c = self.shape, self.config.lora
    count = s.num_params
    if c.rank:
      attention = 2 * (s.num_heads + s.num_kv_heads) * s.head_dim
      width = 4 * s.embed_dim + attention + 3 * (s.embed_dim + s.mlp_dim)
      count = s.num_layers * c.rank * width
    return count / (self.fsdp * self.tensor)

  def chunk(self, rows: float) -> float:
    """Bytes of the logits that exist at once: the array and two more.

    Args:
      rows: of a pass, on this device.
    """
    _, columns = config_lib.lengths(self.config)
    most = self.config.model.logprob_chunk // (rows * self.rows_over)
    tokens = rows * min(columns, max(1, most))
    return 3 * 4 * tokens * self.shape.vocab_size / self.tensor

  @property
  def resident(self) -> float:
    """Share of all numbers that a device holds of a model that is trained."""
    s = self.shape
    shared = s.num_params
    whole = 0
    if partition.RULES['kv_heads'] is None:
      whole = 2 * s.num_layers * s.embed_dim * s.num_kv_heads * s.head_dim
    return ((shared - whole) / self.tensor + whole) / shared / self.fsdp

  def working(self, rows: float, columns: int, keys: int) -> float:
    """Bytes of one layer's activations for rows of so many columns."""
    s = self.shape
    heads = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
    dense = 4 * s.embed_dim + (3 * s.mlp_dim + 2 * heads) / self.tensor
    scores = rows * s.num_heads / self.tensor * columns * keys * (4 + self.item)
    scores = 0 if self.fused else scores
    return rows * columns * dense * self.item + scores

  def gathered(self) -> float:
    """Two layers' weights whole, where they are shared."""
    shared = 2 * self.layers / self.shape.num_layers
    return shared if self.fsdp > 1 else 0.0

  @property
  def decoding(self) -> split.Decoding:
    """What is decoded at once."""
    _, rows = passes_of('ppo/rollout', self.config)
    return split.Decoding(
        model_configs.trained_whole(self.shape, self.config.model),
        (self.data, self.fsdp, self.tensor),
        rows,
        sum(config_lib.lengths(self.config)),
    )

  @property
  def decode_copy(self) -> tuple[int, float]:
    """Devices to a copy of the weights while decoding, and bytes on each."""
    copy = self.config.rollout.tensor or split.fastest(self.decoding, self.chip)
    return copy, self.shape.num_params * self.item / copy

  def flops(self, tokens: float, times: int) -> float:
    """Of so many forward passes over so many tokens, without attention."""
    return 2 * times * self.shape.num_params * tokens


def _ring(n: int) -> float:
  return (n - 1) / n


def passes_of(name: str, config: ConfigDict) -> tuple[int, int]:
  """(micro-batches of a step, rows of one) of a program; pairs are two rows."""
  stage = name.partition('/')[0]
  block = config[stage]
  if stage != 'ppo':
    micro = block.micro_batch_size or block.batch_size
    per = 2 if stage == 'reward_model' else 1
    return block.batch_size // micro, micro * per
  rows = block.batch_size * block.samples_per_prompt
  if is_decode(name):
    micro = config.rollout.batch_size or rows
    return rows // micro, micro
  micro = block.micro_batch_size or rows // block.minibatches
  epochs = block.ppo_epochs if '/update' in name else 1
  return epochs * rows // micro, micro


def is_decode(name: str) -> bool:
  """Whether a program belongs to drawing responses."""
  return any(w in name for w in ('rollout', 'prefill', 'decode', 'reshard'))


def _saved(z: Sizes, rows: float, columns: int) -> tuple[float, int]:
  """(bytes that layers keep for the backward pass, forward passes in all)."""
  s, remat = z.shape, z.config.model.remat
  inputs = rows * columns * s.embed_dim * z.item
  if remat in ('full', 'attention'):
    return s.num_layers * inputs, 2
  if remat == 'none':
    return 1.8 * s.num_layers * z.working(rows, columns, columns), 1
  # Policies between the two keep about the results of matrix products.
  heads = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
  products = (heads + 2 * s.mlp_dim) / z.tensor / s.embed_dim
  return s.num_layers * inputs * (1 + products), 1


def _update(name: str, z: Sizes) -> Load:
  s, passes, rows = z.shape, *passes_of(name, z.config)
  rows /= z.rows_over
  columns = sum(config_lib.lengths(z.config))
  work = z.working(rows, columns, columns)
  saved, again = _saved(z, rows, columns)
  full = not z.config.lora.rank
  grads = 4 * z.trained * (2 if passes > 1 else 1)
  copies = (z.table + z.layers) / z.fsdp if full and z.item == 2 else 0
  has_head = name != 'ppo/update_critic' and 'reward' not in name
  head = z.chunk(rows) if has_head else 0
  head += 3 * z.table * (head > 0) * (z.fsdp > 1)
  temp = saved + work + z.gathered() + grads + copies + head
  # Gathered weights are written and read; activations pass HBM ten times.
  per_pass = (again + 1) * 2 * (z.table + z.layers) + 10 * s.num_layers * work
  sent = (again + (2 if full else 0)) * (z.table + z.layers) * _ring(z.fsdp)
  activations = 2 * rows * columns * s.embed_dim * z.item * _ring(z.tensor)
  sent += (2 + 2 * again) * s.num_layers * activations
  tokens = passes * rows * z.rows_over * columns
  # A backward pass takes twice a forward one, half of it for the weights.
  times = again + (2 if full else 1)
  moved = passes * (per_pass + 16 * z.trained) + 28 * z.trained
  # Of activations of a layer's two halves, there and back.
  sums = (2 + 2 * again) * s.num_layers
  waits = passes * sums * chips.latency(z.chip, z.tensor, rounds=2)
  return Load(temp, moved, passes * sent, z.flops(tokens, times), waits)


def _score(name: str, z: Sizes) -> Load:
  passes, rows = passes_of(name, z.config)
  rows /= z.rows_over
  columns = sum(config_lib.lengths(z.config))
  work = z.working(rows, columns, columns)
  weights = 4 * (z.table + z.layers)
  temp = max(work + z.gathered() / 2, z.table * (z.fsdp > 1) + z.chunk(rows))
  activations = (
      2 * rows * columns * z.shape.embed_dim * z.item * _ring(z.tensor)
  )
  sent = weights * _ring(z.fsdp) + 8 * z.shape.num_layers * activations
  moved = 2 * weights + 4 * z.shape.num_layers * 2 * work
  tokens = passes * rows * z.rows_over * columns
  return Load(temp, passes * moved, passes * sent, z.flops(tokens, 4))


def _one_pass(name: str, z: Sizes) -> Load:
  """Policy, perhaps critic, and the models that only score, in one pass."""
  joint = z.config.ppo.one_pass == 'joint'
  policy, score = _update(name, z), _score(name, z)
  critic = _update('ppo/update_critic', z) if joint else Load(0, 0, 0, 0)
  # Two or three of the four models are scored here.
  scored = 1 / 2 if joint else 3 / 4
  grads = 4 * z.trained * joint
  return Load(
      max(policy.temp, critic.temp, score.temp) + grads,
      policy.hbm + critic.hbm + scored * score.hbm,
      policy.wire + critic.wire + scored * score.wire,
      policy.flops + critic.flops + scored * score.flops,
      policy.waits + critic.waits,
  )


def cache_bytes(z: Sizes, rows: float) -> float:
  """Keys and values of so many rows, prompt and response."""
  s = z.shape
  token = 2 * s.num_layers * s.num_kv_heads * s.head_dim * z.item
  return rows * sum(config_lib.lengths(z.config)) * token


def _rollout(name: str, z: Sizes) -> Load:
  passes, rows = passes_of(name, z.config)
  rows /= z.rows_over
  prompt, response = config_lib.lengths(z.config)
  cache = cache_bytes(z, rows)
  logits = 3 * 4 * rows * z.shape.vocab_size / z.tensor
  copy, share = z.decode_copy
  # Parts of two layers and of the table beside what decodes.
  parts = 2 * share / z.shape.num_layers + z.table * z.tensor / copy
  temp = 1.5 * cache + logits + parts * (z.fsdp * z.tensor > 1)
  temp += z.working(rows, prompt, prompt + response)
  tokens = passes * rows * z.rows_over * (prompt + response)
  # While decoding, no weight is sent: sums of activations are.
  rows *= copy / z.tensor
  activations = 4 * rows * z.shape.embed_dim * z.item * _ring(copy)
  sent = (prompt + response) * z.shape.num_layers * activations
  moved = share + 0.75 * cache + logits
  steps = passes * response
  waits = steps * split.latency(z.shape, z.chip, copy)
  return Load(temp, steps * moved, passes * sent, z.flops(tokens, 1), waits)


def _reshard(z: Sizes) -> Load:
  """The policy from its layout in training to that of decoding."""
  _, share = z.decode_copy
  # A device receives what it will keep, layer by layer.
  return Load(2 * share / z.shape.num_layers, 2 * share, share, 0.0)


def is_fused(name: str, config: ConfigDict, machine: Machine) -> bool:
  """Whether a program attends with a kernel that holds no scores.

  Args:
    name: as `Stage.programs` calls it.
    config: of the run.
    machine: what it runs on.
  """
  stage = name.partition('/')[0]
  on_padding = any(
      field.startswith(f'{stage}.')
      and config_lib.flatten(config)[field] == loss
      for field, loss in config_lib.LOSSES_ON_PADDING.items()
  )
  if is_decode(name) or on_padding:
    return False
  shape = presets.from_config(config.model, config.tokenizer.vocab_size)
  shape = model_configs.trained_whole(shape, config.model)
  return kernels.chosen(shape, machine) != 'xla'


def load(
    name: str, config: ConfigDict, num_devices: int, chip: chips.Chip
) -> Load:
  """What a program takes, by its name.

  Args:
    name: as `Stage.programs` calls it; of unknown ones nothing is said.
    config: of the run.
    num_devices: as many as the mesh has.
    chip: of these devices; that of a GPU decides the kernel of attention.
  """
  z = Sizes.of(config, num_devices, chip)
  if chip.capability:
    machine = Machine('gpu', chip.capability)
    z = dataclasses.replace(z, fused=is_fused(name, config, machine))
  if name.endswith('/one_pass'):
    return _one_pass(name, z)
  if '/update' in name:
    return _update(name, z)
  if name.endswith('/score'):
    return _score(name, z)
  if 'reshard' in name:
    return _reshard(z)
  if is_decode(name):
    return _rollout(name, z)
  rows = passes_of(name, config)[1] / z.rows_over
  small = rows * sum(config_lib.lengths(config)) * 4 * 40
  return Load(small, 4 * small, math.sqrt(small), 0.0)
