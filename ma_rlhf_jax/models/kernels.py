"""Fused attention of whole padded rows, and which kernel a platform gets.

`splash` (Pallas, TPU) and `cudnn` (GPU) never hold a [N, L, L] array. They
cover causal attention among the real tokens of left- or right-padded rows, as
training and scoring need it; decoding and every other mask stay with
`attention.attend`. What stands at padding differs between kernels, what stands
at real tokens does not.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.parallel.partition import Machine
from ma_rlhf_jax.structs import Array

# Names what `model.remat='attention'` keeps: the output of attention, and of
# splash the log-sums of its softmax too, so that it does not run again.
SAVED = 'attention'

# A block and the lanes of a TPU register.
_BLOCKS, _LANES = (512, 384, 256, 128), 128

# The lowest compute capability that cuDNN attends on, and the widest heads of
# which it has gradients, by the first digit (128 elsewhere). JAX lets 256 pass
# on Blackwell (10.0 on) too, where cuDNN computes the outputs only. Sources:
# jax/_src/cudnn/fused_attention_stablehlo.py, and the support matrix in
# docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html.
_CUDNN_FROM = (8, 0)
_CUDNN_WIDEST = {9: 256}


def refusal(kernel: str, config: GemmaConfig, machine: Machine) -> str:
  """Why a kernel cannot serve a model on a machine; '' where it can.

  Args:
    kernel: 'splash' or 'cudnn'; 'xla' and 'auto' always can.
    config: of the model.
    machine: what it runs on, see `partition.machine`.
  """
  if kernel == 'splash':
    if machine.platform != 'tpu':
      return f'splash attention runs on TPUs, not on this {machine.platform}'
    if config.head_dim % _LANES:
      return (
          f'splash attention needs heads of a multiple of {_LANES} numbers, '
          f'not {config.head_dim}'
      )
  return _cudnn_refusal(config, machine) if kernel == 'cudnn' else ''


def _cudnn_refusal(config: GemmaConfig, machine: Machine) -> str:
  if machine.platform != 'gpu':
    return f'cuDNN runs on NVIDIA GPUs, not on this {machine.platform}'
  if machine.capability is None:
    return 'cuDNN runs on NVIDIA GPUs, and this one tells no compute capability'
  this = 'this GPU has {}.{}'.format(*machine.capability)
  if machine.capability < _CUDNN_FROM:
    return (
        'cuDNN attends from compute capability {}.{} on, and '.format(
            *_CUDNN_FROM
        )
        + this
    )
  if config.attn_softcap:
    return (
        'cuDNN has no bound of attention scores, and this model has one of '
        f'{config.attn_softcap:g}'
    )
  if config.dtype not in ('bfloat16', 'float16'):
    return f'cuDNN attends in bfloat16 or float16, not in {config.dtype}'
  most = _CUDNN_WIDEST.get(machine.capability[0], 128)
  if config.head_dim % 8 or config.head_dim > most:
    return (
        f'cuDNN needs heads of a multiple of 8 and at most {most} numbers, not '
        f'{config.head_dim} ({this}; at most 256 on 9.x alone)'
    )
  return ''


def chosen(config: GemmaConfig, machine: Machine) -> str:
  """The kernel of `config.attention`: with 'auto', the first that can serve.

  Raises:
    ValueError: if the one that is asked for cannot.
  """
  asked = config.attention
  if asked == 'auto':
    fused = (k for k in KERNELS if not refusal(k, config, machine))
    return next(fused, 'xla')
  reason = refusal(asked, config, machine)
  if reason:
    raise ValueError(f"model.attention='{asked}': {reason}; use 'auto'")
  return asked


def plain(config: GemmaConfig) -> GemmaConfig:
  """`config` with plain attention, for losses that read padding.

  There kernels differ, so that a loss would depend on the machine.
  """
  return dataclasses.replace(config, attention='xla')


def splash(
    queries_BLNH: Array,
    keys_BLKH: Array,
    values_BLKH: Array,
    real_BL: Array,
    *,
    scale: float,
    softcap: float,
    window: int,
    interpret: bool = False,
) -> Array:
  """Splash attention; rows are padded to a multiple of its block.

  A padded query attends to the padding before it and to itself, never to
  nothing.

  Args:
    queries_BLNH: float queries.
    keys_BLKH: float keys; K divides N.
    values_BLKH: float values.
    real_BL: bool, true on real tokens.
    scale: multiplies the dot products.
    softcap: bound of the scores; 0 = none.
    window: keys a query sees, its own included; 0 = all before it.
    interpret: run the kernel step by step, on any platform.
  """
  # Half a second, which only TPUs need to spend.
  from jax.experimental.pallas.ops.tpu import splash_attention

  length, heads = queries_BLNH.shape[1:3]
  padded = -(-length // _LANES) * _LANES
  block = next(b for b in _BLOCKS if padded % b == 0)
  shape = (padded, padded)
  mask = splash_attention.CausalMask(shape)
  if window:
    mask = splash_attention.LocalMask(shape, (window - 1, 0), offset=0)
  one_key = keys_BLKH.shape[2] == 1
  make = splash_attention.make_splash_mha
  if one_key:
    make = splash_attention.make_splash_mqa
  sizes = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv')
  sizes += ('block_q_dq', 'block_kv_dq')
  kernel = make(
      splash_attention.MultiHeadMask([mask] * heads),
      block_sizes=splash_attention.BlockSizes(**dict.fromkeys(sizes, block)),
      attn_logits_soft_cap=softcap or None,
      residual_checkpoint_name=SAVED,
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
  )

  def heads_first(x_BLxH: Array) -> Array:
    widths = ((0, 0), (0, padded - length), (0, 0), (0, 0))
    return jnp.pad(x_BLxH, widths).swapaxes(1, 2)

  q, k, v = map(heads_first, (queries_BLNH, keys_BLKH, values_BLKH))
  if one_key:
    k, v = k[:, 0], v[:, 0]
  kinds_BL = jnp.pad(real_BL, ((0, 0), (0, padded - length))).astype(jnp.int32)
  mixed_BNLH = jax.vmap(kernel)(
      q * jnp.asarray(scale, q.dtype),
      k,
      v,
      splash_attention.SegmentIds(kinds_BL, kinds_BL),
  )
  return mixed_BNLH.swapaxes(1, 2)[:, :length]


def cudnn(
    queries_BLNH: Array,
    keys_BLKH: Array,
    values_BLKH: Array,
    real_BL: Array,
    *,
    scale: float,
    softcap: float,
    window: int,
) -> Array:
  """cuDNN's flash attention; arguments as in `splash`.

  It knows lengths of rows but no padding on the left, so that rows are rolled
  to the left and back; real tokens of a row must stand together.
  """
  del softcap  # refused where there is one
  first_B = jnp.argmax(real_BL, axis=1).astype(jnp.int32)
  # A row without tokens counts as one, which nobody reads.
  lengths_B = jnp.maximum(jnp.sum(real_BL, axis=1, dtype=jnp.int32), 1)
  roll = jax.vmap(lambda x, n: jnp.roll(x, n, axis=0))
  mixed_BLNH = jax.nn.dot_product_attention(
      roll(queries_BLNH, -first_B),
      roll(keys_BLKH, -first_B),
      roll(values_BLKH, -first_B),
      scale=scale,
      is_causal=True,
      query_seq_lengths=lengths_B,
      key_value_seq_lengths=lengths_B,
      local_window_size=(window - 1, 0) if window else None,
      implementation='cudnn',
  )
  return checkpoint_name(roll(mixed_BLNH, first_B), SAVED)


# In the order in which 'auto' tries them.
KERNELS: dict[str, Callable[..., Array]] = {'splash': splash, 'cudnn': cudnn}


def _shared(keys_BLKH: Array, heads: int, shards: int) -> tuple[Array, bool]:
  """Keys that `shards` devices can share, and whether they split them.

  Each device needs the keys of its own query heads. One key head is on all of
  them; fewer heads than devices are repeated to one a device.
  """
  count = keys_BLKH.shape[2]
  if count == 1:
    return keys_BLKH, False
  if count % shards:
    if shards % count or heads % shards:
      raise ValueError(
          f'{count} key heads and {heads} query heads cannot be shared by '
          f'mesh.tensor={shards} devices; one must divide the other'
      )
    keys_BLKH = jnp.repeat(keys_BLKH, shards // count, axis=2)
  return keys_BLKH, True


def attend_rows(
    kernel: Callable[..., Array],
    queries_BLNH: Array,
    keys_BLKH: Array,
    values_BLKH: Array,
    real_BL: Array,
    *,
    scale: float,
    softcap: float,
    window: int,
) -> Array:
  """[B, L, N, H]: `kernel` on each device's own rows and heads.

  Compilers cannot split a kernel, so it runs inside `jax.shard_map`.

  Args:
    kernel: of `KERNELS`. All others: see `splash`.
  """
  kernel = functools.partial(
      kernel, scale=scale, softcap=softcap, window=window
  )
  mesh = partition.current_mesh()
  if mesh is None:
    return kernel(queries_BLNH, keys_BLKH, values_BLKH, real_BL)
  heads, shards = queries_BLNH.shape[2], mesh.shape['tensor']
  keys_BLKH, split = _shared(keys_BLKH, heads, shards)
  values_BLKH, _ = _shared(values_BLKH, heads, shards)
  rows = partition.spec(('batch',))[0]
  of_heads = PartitionSpec(rows, None, 'tensor', None)
  of_keys = of_heads if split else PartitionSpec(rows)
  return jax.shard_map(
      kernel,
      in_specs=(of_heads, of_keys, of_keys, PartitionSpec(rows)),
      out_specs=of_heads,
      check_vma=False,  # the kernels do not say what varies over devices
  )(queries_BLNH, keys_BLKH, values_BLKH, real_BL)
