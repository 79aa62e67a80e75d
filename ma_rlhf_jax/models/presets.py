"""The shapes of Gemma models, and the published ones by name."""

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters (arXiv 2106.09685): `W + alpha / rank * A B`.

  Attributes:
    rank: width of A [inputs, rank] and B [rank, outputs], >= 1.
    alpha: scale of the product, divided by the rank.
    targets: the kernels that get adapters, some of `config.KERNELS`.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


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
    family: 'gemma', or 'gemma2', whose blocks also norm what they add.
    query_pre_attn_scalar: dot products are divided by its root; 0 = head_dim.
    attn_softcap: attention scores s become cap * tanh(s / cap); 0 = off.
    final_softcap: the same of the logits.
    sliding_window: tokens that a sliding layer attends to, its own included.
    sliding_layers: which layers slide, one bool a layer; () = none.
    dtype: of activations and matmuls.
    param_dtype: of the parameters when they are created.
    kernel_dtype: of matrices and embedding when they are created; '' =
      param_dtype. Frozen models hold them as they are computed with.
    remat: what the backward pass recomputes, a key of `gemma.REMAT`.
    unroll: layers in one turn of the loop over them; 0 = no loop.
    logprob_chunk: tokens whose logits a device holds at once in the vocabulary
      head.
    attention: auto | xla | splash | cudnn, see `models.kernels`.
    lora: adapters beside the kernels; None = none.
    unrolled: each layer has its own parameters, `layer_0`, ..., in place of
      one stack `layers` for a scan; see `rollout.layout`.
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
  family: str = 'gemma'
  query_pre_attn_scalar: float = 0
  attn_softcap: float = 0.0
  final_softcap: float = 0.0
  sliding_window: int = 0
  sliding_layers: tuple[bool, ...] = ()
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  kernel_dtype: str = ''
  remat: str = 'full'
  unroll: int = 1
  logprob_chunk: int = 512
  attention: str = 'auto'
  lora: Lora | None = None
  unrolled: bool = False

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  @property
  def post_norms(self) -> bool:
    """Whether blocks norm their output before it is added."""
    return self.family == 'gemma2'

  @property
  def attention_scale(self) -> float:
    """What dot products of queries and keys are multiplied by."""
    return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

  @property
  def as_created(self) -> 'GemmaConfig':
    """The same for all models whose parameters are created alike."""
    return dataclasses.replace(
        self,
        dtype='float32',
        kernel_dtype=self.kernel_dtype or self.param_dtype,
        remat='none',
        unroll=1,
        logprob_chunk=512,
        attention='xla',
    )

  @property
  def num_params(self) -> int:
    """Parameters of the policy without adapters; the tied head counts once."""
    d, heads = self.embed_dim, self.num_heads + self.num_kv_heads
    attention = 2 * d * self.head_dim * heads
    norms = (4 if self.post_norms else 2) * d
    return (
        self.vocab_size * d
        + d
        + self.num_layers * (attention + 3 * d * self.mlp_dim + norms)
    )


# The fields that are choices of a run; the others decide the shapes of the
# parameters and what they mean.
_RUNTIME_FIELDS = (
    'dtype',
    'param_dtype',
    'kernel_dtype',
    'remat',
    'unroll',
    'logprob_chunk',
    'attention',
    'lora',
    'unrolled',
)
SHAPE_FIELDS = tuple(
    f.name
    for f in dataclasses.fields(GemmaConfig)
    if f.name not in _RUNTIME_FIELDS
)


def every_other(num_layers: int) -> tuple[bool, ...]:
  """Gemma 2's sliding layers: the first, the third, ..."""
  return tuple(layer % 2 == 0 for layer in range(num_layers))


def _gemma2(
    num_layers: int, *sizes: int, query_pre_attn_scalar: float
) -> GemmaConfig:
  return GemmaConfig(
      256_000,
      num_layers,
      *sizes,
      family='gemma2',
      query_pre_attn_scalar=query_pre_attn_scalar,
      attn_softcap=50.0,
      final_softcap=30.0,
      sliding_window=4096,
      sliding_layers=every_other(num_layers),
  )


_GEMMA_2B = GemmaConfig(256_000, 18, 2048, 16_384, 8, 1, 256)
_GEMMA_7B = GemmaConfig(256_000, 28, 3072, 24_576, 16, 16, 256)

# Name at google/ on the hub -> shape, as its config.json has it.
PRESETS: dict[str, GemmaConfig] = {
    'gemma-2b': _GEMMA_2B,
    'gemma-7b': _GEMMA_7B,
    'codegemma-2b': _GEMMA_2B,
    'codegemma-7b-it': _GEMMA_7B,
    'gemma-2-2b': _gemma2(26, 2304, 9216, 8, 4, 256, query_pre_attn_scalar=256),
    'gemma-2-9b': _gemma2(
        42, 3584, 14_336, 16, 8, 256, query_pre_attn_scalar=256
    ),
    'gemma-2-27b': _gemma2(
        46, 4608, 36_864, 32, 16, 128, query_pre_attn_scalar=144
    ),
}


def from_config(model: ConfigDict, vocab_size: int) -> GemmaConfig:
  """The shape that the `model` block of a config describes.

  Args:
    model: `config.model`; its `preset` decides where it names one.
    vocab_size: entries of the tokenizer, used where the block says 0.
  """
  if model.preset:
    return PRESETS[model.preset]
  slides = every_other(model.num_layers) if model.sliding_window else ()
  values = {f: model[f] for f in SHAPE_FIELDS if f != 'sliding_layers'}
  values['vocab_size'] = model.vocab_size or vocab_size
  if model.family == 'gemma2' and not model.query_pre_attn_scalar:
    values['query_pre_attn_scalar'] = model.head_dim  # as files spell it out
  return GemmaConfig(**values, sliding_layers=slides)
