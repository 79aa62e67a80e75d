"""The shape of a Gemma."""

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
  """Sizes, constants and dtypes of one Gemma; hashable, so static under jit.

  Attributes:
    vocab_size: rows of the embedding, V.
    num_layers: X.
    embed_dim: width, D.
    mlp_dim: width of the gated MLP, F.
    num_heads: query heads, N.
    num_kv_heads: key and value heads, K; divides N.
    head_dim: H; N * H need not be D.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    dtype: of activations and matmuls.
    param_dtype: of the parameters when they are created.
    remat: recompute each layer in the backward pass.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  remat: bool = True

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  @property
  def num_params(self) -> int:
    """Parameters of the policy; the tied head counts once."""
    d, heads = self.embed_dim, self.num_heads + self.num_kv_heads
    attention = 2 * d * self.head_dim * heads
    return (
        self.vocab_size * d
        + d
        + self.num_layers * (attention + 3 * d * self.mlp_dim + 2 * d)
    )


# The fields that decide the shapes of the parameters and what they mean; the
# others are choices of a run.
SHAPE_FIELDS = tuple(
    f.name
    for f in dataclasses.fields(GemmaConfig)
    if f.name not in ('dtype', 'param_dtype', 'remat')
)


def from_fields(model: ConfigDict, vocab_size: int) -> GemmaConfig:
  """The shape that the `model` block of a config describes.

  Args:
    model: `config.model`.
    vocab_size: entries of the tokenizer, used where the block says 0.
  """
  fields = {f.name for f in dataclasses.fields(GemmaConfig)}
  values = {name: model[name] for name in fields}
  return GemmaConfig(**{**values, 'vocab_size': model.vocab_size or vocab_size})


def with_runtime(shape: GemmaConfig, model: ConfigDict) -> GemmaConfig:
  """`shape` with the dtypes and the remat choice of this run."""
  return dataclasses.replace(
      shape,
      dtype=model.dtype,
      param_dtype=model.param_dtype,
      remat=model.remat,
  )
