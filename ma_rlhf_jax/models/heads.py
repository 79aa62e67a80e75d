"""Reward model and critic: a Gemma with a linear scalar head without bias."""

from collections.abc import Callable
import functools

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ma_rlhf_jax import masking
from ma_rlhf_jax.models.gemma import Gemma, dummy_inputs
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.partition import param_shardings
from ma_rlhf_jax.structs import Array, Params


def _head_initializer(config: GemmaConfig) -> nn.initializers.Initializer:
  """Scores of order one: std 1 / sqrt(D + 1) (arXiv 2009.01325, B.1)."""
  return nn.initializers.normal((config.embed_dim + 1) ** -0.5)


class ScalarGemma(nn.Module):
  """One number a token: `backbone(tokens) @ head`.

  The parameters are {'backbone': those of a policy, 'head': [D]}, so that a
  reward model starts from a policy and a critic from a reward model.
  """

  config: GemmaConfig

  @nn.compact
  def __call__(
      self, tokens_BL: Array, positions_BL: Array, mask: Array, ends: int = 0
  ) -> Array:
    hidden_BLD, _ = Gemma(self.config, name='backbone')(
        tokens_BL, positions_BL, mask, ends=ends
    )
    init = _head_initializer(self.config)
    head_D = self.param(
        'head',
        init,
        (self.config.embed_dim,),
        jnp.dtype(self.config.param_dtype),
    )
    dtype = masking.wide(hidden_BLD.dtype)
    return jnp.einsum(
        'bld,d->bl', hidden_BLD.astype(dtype), head_D.astype(dtype)
    )


def token_scores(
    config: GemmaConfig,
    params: Params,
    tokens_BL: Array,
    mask_BL: Array,
    ends: int = 0,
) -> Array:
  """float [B, L]: what a reward model or critic says at each token.

  With `ends` only at those of so many columns, [B, ends].
  """
  return ScalarGemma(config).apply(
      {'params': params}, tokens_BL, masking.positions(mask_BL), mask_BL, ends
  )


# How to create the parameters of each kind of model.
MODELS: dict[str, Callable[[GemmaConfig], nn.Module]] = {
    'policy': Gemma,
    'scalar': ScalarGemma,
}


def abstract_params(
    kind: str, config: GemmaConfig, mesh: Mesh | None = None
) -> Params:
  """Shapes, dtypes and (under a mesh) shardings, without allocating.

  Args:
    kind: 'policy' or 'scalar', a key of `MODELS`.
    config: the shape.
    mesh: whose devices need not be here; None = that of `jax.set_mesh`.

  Returns:
    A tree of `jax.ShapeDtypeStruct`.
  """
  params = jax.eval_shape(
      lambda: MODELS[kind](config).init(jax.random.key(0), *dummy_inputs())
  )['params']
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      params,
      param_shardings(params, mesh),
  )


def init_params(
    kind: str,
    config: GemmaConfig,
    key: Array,
    keep: Callable[[str], bool] = lambda path: True,
) -> Params:
  """Random parameters, created in their shardings.

  Args:
    kind: 'policy' or 'scalar'.
    config: the shape.
    key: random key, used once.
    keep: path, its parts joined by '/', -> whether it is wanted; nothing else
      is made.
  """
  mesh = jax.sharding.get_mesh()
  return _initializer(kind, config.as_created, keep, mesh)(key)


@functools.lru_cache(maxsize=8)
def _initializer(
    kind: str,
    config: GemmaConfig,
    keep: Callable[[str], bool],
    mesh: jax.sharding.Mesh,
) -> Callable[[Array], Params]:
  """Key -> parameters: models of one shape share its compilation."""
  del mesh  # the shardings are of the one that is set

  def wanted(tree: Params) -> Params:
    flat = traverse_util.flatten_dict(tree, sep='/')
    kept = {path: x for path, x in flat.items() if keep(path)}
    return traverse_util.unflatten_dict(kept, sep='/')

  shardings = wanted(
      jax.tree.map(lambda x: x.sharding, abstract_params(kind, config))
  )
  init = lambda key: wanted(
      MODELS[kind](config).init(key, *dummy_inputs())['params']
  )
  return jax.jit(init, out_shardings=shardings)


def init_head(config: GemmaConfig, key: Array) -> Array:
  """A random scalar head [D] for a backbone that exists."""
  sharding = abstract_params('scalar', config)['head'].sharding
  init = _head_initializer(config)
  shape, dtype = (config.embed_dim,), jnp.dtype(config.param_dtype)
  create = lambda key: init(key, shape, dtype)
  return jax.jit(create, out_shardings=sharding)(key)
