"""What our parameters are called in a Hugging Face folder, and how they lie.

`WEIGHTS` is the one table between our parameters and their tensors, and `SIZES`
the one between the shapes; `huggingface` reads and `exporting` writes by them.
"""

import math
from typing import NamedTuple

from flax import traverse_util

from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.structs import Array


class Weight(NamedTuple):
  """What one of our parameters is called and how it lies in their files.

  Attributes:
    name: their tensor; {} stands for the layer, which is our first axis.
    inputs: how many of our axes (without the layer) are summed over. They hold
      a matrix [outputs, inputs], we [*inputs, *outputs]; 0 if both are alike.
  """

  name: str
  inputs: int


# In a scalar model these lie below `backbone`, beside `head`.
_WEIGHTS = {
    'embedding': Weight('embed_tokens.weight', 0),
    'layers/attention_norm/scale': Weight(
        'layers.{}.input_layernorm.weight', 0
    ),
    'layers/attention/query': Weight('layers.{}.self_attn.q_proj.weight', 1),
    'layers/attention/key': Weight('layers.{}.self_attn.k_proj.weight', 1),
    'layers/attention/value': Weight('layers.{}.self_attn.v_proj.weight', 1),
    'layers/attention/out': Weight('layers.{}.self_attn.o_proj.weight', 2),
    'layers/mlp/gate': Weight('layers.{}.mlp.gate_proj.weight', 1),
    'layers/mlp/up': Weight('layers.{}.mlp.up_proj.weight', 1),
    'layers/mlp/down': Weight('layers.{}.mlp.down_proj.weight', 1),
    'final_norm/scale': Weight('norm.weight', 0),
}
# The norm before the MLP is named after the attention before it in Gemma 1;
# Gemma 2 gives that name to the norm of what attention adds.
NORMS = {
    'gemma': {'mlp_norm': 'post_attention_layernorm'},
    'gemma2': {
        'attention_post_norm': 'post_attention_layernorm',
        'mlp_norm': 'pre_feedforward_layernorm',
        'mlp_post_norm': 'post_feedforward_layernorm',
    },
}
# model_type -> path of our parameter -> theirs.
WEIGHTS = {
    family: _WEIGHTS
    | {
        f'layers/{ours}/scale': Weight(f'layers.{{}}.{theirs}.weight', 0)
        for ours, theirs in norms.items()
    }
    for family, norms in NORMS.items()
}
# Their size -> ours.
SIZES = {
    'vocab_size': 'vocab_size',
    'num_hidden_layers': 'num_layers',
    'hidden_size': 'embed_dim',
    'intermediate_size': 'mlp_dim',
    'num_attention_heads': 'num_heads',
    'num_key_value_heads': 'num_kv_heads',
    'head_dim': 'head_dim',
}
# Their bounds of scores and logits (null = none) -> ours (0 = none).
CAPS = {
    'attn_logit_softcapping': 'attn_softcap',
    'final_logit_softcapping': 'final_softcap',
}
# What Gemma 2 means where a config.json leaves a field out.
GEMMA2_DEFAULTS = {
    'query_pre_attn_scalar': 256,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
    'sliding_window': 4096,
}
# Names of the kinds of layers in `layer_types`.
SLIDING, FULL = 'sliding_attention', 'full_attention'
# What is fetched of a folder: never code, never pickles.
FETCHED = ('*.safetensors', '*.json', 'tokenizer.model')
# Where the tensors lie: in one file, or in shards that an index lists.
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


class Tensor(NamedTuple):
  """One tensor of theirs, and its place in our parameters.

  Attributes:
    name: in the file.
    shape: in the file.
    path: of our parameter, its parts joined by '/'.
    layer: index on our first axis, or None.
    inputs: as in `Weight`.
  """

  name: str
  shape: tuple[int, ...]
  path: str
  layer: int | None
  inputs: int


def to_theirs(x: Array, inputs: int) -> Array:
  """Our layout to theirs, of one layer."""
  if not inputs:
    return x
  return x.reshape(math.prod(x.shape[:inputs]), -1).T


def to_ours(x: Array, inputs: int, shape: tuple[int, ...]) -> Array:
  """Their layout to ours, of one layer; the inverse of `to_theirs`."""
  return (x.T if inputs else x).reshape(shape)


def list_tensors(
    kind: str,
    config: GemmaConfig,
    *,
    prefix: str = 'model.',
    head: str = 'score.weight',
) -> list[Tensor]:
  """Their tensors of a model, in the order in which they are written.

  Args:
    kind: 'policy' or 'scalar'.
    config: the shape.
    prefix: what their names of the backbone start with.
    head: their name of the scalar head.
  """
  targets = traverse_util.flatten_dict(abstract_params(kind, config), sep='/')
  shapes = {path: x.shape for path, x in targets.items()}
  root = 'backbone/' if kind == 'scalar' else ''

  def tensor(path: str, weight: Weight, layer: int | None) -> Tensor:
    shape = shapes[path] if layer is None else shapes[path][1:]
    if i := weight.inputs:
      shape = (math.prod(shape[i:]), math.prod(shape[:i]))
    return Tensor(weight.name.format(layer), shape, path, layer, i)

  single, layers = [], [[] for _ in range(config.num_layers)]
  for path, (name, inputs) in WEIGHTS[config.family].items():
    weight = Weight(prefix + name, inputs)
    if '{}' not in name:
      single.append(tensor(root + path, weight, None))
      continue
    for index, layer in enumerate(layers):
      layer.append(tensor(root + path, weight, index))
  if kind == 'scalar':
    single.append(tensor('head', Weight(head, 1), None))
  return single + [t for layer in layers for t in layer]
