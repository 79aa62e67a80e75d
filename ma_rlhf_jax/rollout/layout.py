"""How a policy lies on the devices while it decodes.

Each token reads all weights once. Weights that are split for training (over
`fsdp`, in float32) would be gathered for every token, so they are cast and laid
out anew once a rollout, where that changes anything: in the compute dtype,
split over `tensor` alone, and, where a scan over layers would copy each layer
out of the stack, layer by layer.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import math
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ma_rlhf_jax.models.gemma import layer_name
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel import chips, partition
from ma_rlhf_jax.parallel.mesh import decode_mesh
from ma_rlhf_jax.rollout import decode, sampling, scoring, split
from ma_rlhf_jax.structs import Array, Params, PromptBatch, Rollout


@dataclasses.dataclass(frozen=True)
class DecodeLayout:
  """Where a decoding policy lies, and in which form; hashable.

  Attributes:
    config: its shape, as `Gemma` runs it.
    mesh: the devices as they decode; None = no mesh.
    train_mesh: the same devices as they train.
  """

  config: GemmaConfig
  mesh: Mesh | None
  train_mesh: Mesh | None

  @property
  def moves(self) -> bool:
    """Whether weights go to other devices than those that train them."""
    return self.mesh is not None and self.mesh.size > 1


def make_layout(
    config: GemmaConfig,
    mesh: Mesh | None,
    tensor: int = 0,
    *,
    rows: int = 1,
    columns: int = 1,
) -> DecodeLayout:
  """The layout of a policy of this shape.

  Args:
    config: the shape of the policy in training.
    mesh: of training.
    tensor: devices to one copy of the weights; 0 = as many as draw a token
      soonest by `split.fastest`.
    rows: that are decoded at once, on all devices.
    columns: prompt and response tokens of a row.
  """
  platform, decoding = jax.default_backend(), None
  if mesh is not None:
    first = mesh.devices.flat[0]
    platform = first.platform
    work = split.Decoding(config, mesh.devices.shape, rows, columns)
    tensor = tensor or split.fastest(work, chips.of_device(first))
    decoding = decode_mesh(mesh, tensor)
  # A TPU reads a layer where it lies in the stack.
  unrolled = platform != 'tpu'
  config = dataclasses.replace(
      config, remat='none', unroll=1, unrolled=unrolled
  )
  return DecodeLayout(config, decoding, mesh)


@contextlib.contextmanager
def decoding_on(layout: DecodeLayout) -> Iterator[None]:
  """Inside, the mesh is that of the layout, also while tracing."""
  if layout.mesh is None:
    yield
    return
  with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
    yield


def _shardings(layout: DecodeLayout, flat: dict[str, Any]) -> dict[str, Any]:
  """Where parameters lie, by path."""
  spec = functools.partial(
      partition.param_spec, mesh=layout.mesh, decoding=True
  )
  return {
      path: NamedSharding(layout.mesh, spec(path, x.shape))
      for path, x in flat.items()
  }


def _unstacked(flat: dict[str, Any], num_layers: int) -> dict[str, Any]:
  """`layers/x` -> `layer_0/x`, `layer_1/x`, ..."""
  made = {}
  for path, x in flat.items():
    first, _, rest = path.partition('/')
    if first != 'layers':
      made[path] = x
      continue
    for layer in range(num_layers):
      made[f'{layer_name(layer)}/{rest}'] = x[layer]
  return made


def _laid_out(params: Params, layout: DecodeLayout) -> Params:
  config = layout.config
  flat = traverse_util.flatten_dict(params, sep='/')
  # Norms multiply in float32 and are small.
  cast = lambda path, x: (
      x if path.endswith('scale') else x.astype(config.compute_dtype)
  )
  flat = {path: cast(path, x) for path, x in flat.items()}
  if config.unrolled:
    flat = _unstacked(flat, config.num_layers)
  if layout.moves:
    flat = {
        path: _moved(layout, path, flat[path], sharding)
        for path, sharding in _shardings(layout, flat).items()
    }
  return traverse_util.unflatten_dict(flat, sep='/')


def _is_even(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
  parts = lambda names: math.prod(
      sharding.mesh.shape[name]
      for name in ((names,) if isinstance(names, str) else names or ())
  )
  sizes = zip(shape, map(parts, sharding.spec), strict=False)
  return all(size % part == 0 for size, part in sizes)


@functools.lru_cache(maxsize=16)
def _program(
    layout: DecodeLayout, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> jax.stages.Wrapped:
  lay_out = functools.partial(_laid_out, layout=layout)
  if not layout.moves:
    return jax.jit(lay_out)
  given = {path: jax.ShapeDtypeStruct(x, jnp.float32) for path, x in shapes}
  made = jax.eval_shape(lay_out, traverse_util.unflatten_dict(given, sep='/'))
  flat = traverse_util.flatten_dict(made, sep='/')
  # Without them XLA may give whole copies, where the layout of a result is not
  # one of whole axes of the mesh in training. It decides where parts are of
  # unequal size, which a result cannot have.
  to = {
      path: sharding if _is_even(sharding, flat[path].shape) else None
      for path, sharding in _shardings(layout, flat).items()
  }
  return jax.jit(
      lay_out, out_shardings=traverse_util.unflatten_dict(to, sep='/')
  )


def _stays(layout: DecodeLayout, path: str, x: Any) -> bool:
  """Whether a parameter decodes as it trains, where it trains."""
  if layout.moves or (layout.config.unrolled and path.startswith('layers/')):
    return False
  return path.endswith('scale') or x.dtype == layout.config.compute_dtype


def decode_program(
    params: Params, layout: DecodeLayout
) -> tuple[jax.stages.Wrapped, Params]:
  """The jitted function that `to_decode` calls, and what it is given.

  Returns:
    The function, and those of the parameters that need a copy; {} = none.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  flat = {k: x for k, x in flat.items() if not _stays(layout, k, x)}
  shapes = tuple((path, x.shape) for path, x in flat.items())
  return _program(layout, shapes), traverse_util.unflatten_dict(flat, sep='/')


def to_decode(params: Params, *, layout: DecodeLayout) -> Params:
  """The parameters of a policy in training, in the layout of a decoding one.

  What decodes as it trains is the array itself, not a copy, so it is gone when
  an update has consumed the policy.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  flat = {k: x for k, x in flat.items() if _stays(layout, k, x)}
  function, copied = decode_program(params, layout)
  if copied:
    flat |= traverse_util.flatten_dict(function(copied), sep='/')
  return traverse_util.unflatten_dict(flat, sep='/')


def _between(layout: DecodeLayout) -> Mesh:
  """The devices along (data, fsdp, moved, tensor).

  Training splits `embed` over fsdp x moved and heads over tensor, decoding
  splits heads over moved x tensor.
  """
  data, fsdp, tensor = layout.mesh.devices.shape
  before = layout.train_mesh.devices.shape[2]
  return Mesh(
      layout.mesh.devices.reshape(data, fsdp, tensor // before, before),
      ('data', 'fsdp', 'moved', 'tensor'),
  )


def _moved(
    layout: DecodeLayout, path: str, x: Array, to: NamedSharding
) -> Array:
  """`x` laid out anew; a stack layer by layer.

  Devices first exchange parts of `embed` for parts of heads, of the vocabulary
  or of the mlp, then gather what is left of `embed`. Asked for both at once,
  XLA makes a whole copy on every device, for which a stack is too large, and
  sends 16 times as much for 16 devices to a copy.
  """
  source = partition.param_spec(path, x.shape, layout.train_mesh)
  trained = [('fsdp', 'moved') if a == 'fsdp' else a for a in source]
  decoded = [('moved', 'tensor') if a == 'tensor' else a for a in to.spec]
  splits = 'tensor' in to.spec
  exchanged = [
      'fsdp' if splits and a == 'fsdp' else new or old
      for a, old, new in zip(source, trained, decoded, strict=True)
  ]
  between = _between(layout)

  def move(x: Array, skipped: int = 0) -> Array:
    # The first keeps the others from reaching the whole stack.
    for axes in (trained, exchanged, decoded):
      spec = PartitionSpec(*axes[skipped:])
      x = jax.lax.with_sharding_constraint(x, NamedSharding(between, spec))
    return x

  if path.startswith('layers/'):
    x = jax.lax.map(functools.partial(move, skipped=1), x)
  else:
    x = move(x)
  return jax.lax.with_sharding_constraint(x, to)


def abstract_params(params: Params, layout: DecodeLayout) -> Params:
  """Shapes, dtypes and shardings of what `to_decode` gives."""
  given = traverse_util.flatten_dict(params, sep='/')
  flat = traverse_util.flatten_dict(
      jax.eval_shape(functools.partial(to_decode, layout=layout), params),
      sep='/',
  )
  if layout.mesh is not None:
    flat = {
        path: jax.ShapeDtypeStruct(
            flat[path].shape, flat[path].dtype, sharding=sharding
        )
        for path, sharding in _shardings(layout, flat).items()
    }
  flat |= {k: x for k, x in given.items() if _stays(layout, k, x)}
  return traverse_util.unflatten_dict(flat, sep='/')


def _rows_over(mesh: Mesh, tree: Any) -> Any:
  """Arrays of rows, these over the devices of a mesh that hold rows."""
  rows = NamedSharding(mesh, PartitionSpec(partition.RULES['batch']))
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), tree)


@functools.partial(
    jax.jit, static_argnames=('layout', 'settings', 'num_rollouts')
)
def draw(
    params: Params,
    prompts: PromptBatch,
    stream_key: Array,
    step: Array | int,
    *,
    layout: DecodeLayout,
    settings: decode.SamplingSettings,
    num_rollouts: int = 1,
) -> Rollout:
  """One response a row, decoded in `num_rollouts` batches one by one.

  Args:
    params: what `to_decode` gave.
    prompts: left-padded.
    stream_key: the key of one stream of samples.
    step: the update for which they are drawn.
    layout: of `params`.
    settings: how to sample.
    num_rollouts: divides the rows.

  Returns:
    The rollout, its rows where a training batch has them.
  """
  if layout.mesh is not None:
    # Traced values belong to a mesh; these move to that of the layout.
    prompts = _rows_over(layout.mesh, prompts)
    whole = NamedSharding(layout.mesh, PartitionSpec())
    stream_key, step = jax.lax.with_sharding_constraint(
        (stream_key, jnp.asarray(step)), whole
    )
  with jax.named_scope('rollout'), decoding_on(layout):
    keys_B = sampling.row_keys(
        stream_key, step, prompts.prompt_ids_B, prompts.sample_ids_B
    )
    rollout = scoring.in_micro_batches(
        lambda rows: decode.generate(layout.config, params, *rows, settings),
        (prompts, keys_B),
        num_rollouts,
    )
  if layout.train_mesh is None:
    return rollout
  return _rows_over(layout.train_mesh, rollout)


def sample_responses(params: Params, *args: Any, **how: Any) -> Rollout:
  """`draw` with the parameters of a policy in training."""
  return draw(to_decode(params, layout=how['layout']), *args, **how)
