"""What a config.json of Hugging Face says of a model, as a shape of ours."""

from collections.abc import Iterator, Mapping
from reprlib import repr as shown  # of what may be anything, shortened
from typing import Any

from ma_rlhf_jax.models.presets import GemmaConfig, every_other
from ma_rlhf_jax.models.tensor_names import (
    CAPS,
    FULL,
    GEMMA2_DEFAULTS,
    SIZES,
    SLIDING,
    WEIGHTS,
)

Fields = Mapping[str, Any]

# What we implement; the first is what a file means that leaves the field out.
# 'gelu' stands for the tanh form: the first releases said so by mistake.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    'hidden_act': ('gelu_pytorch_tanh', 'gelu', None),
    'hidden_activation': ('gelu_pytorch_tanh', 'gelu', None),
    'attention_bias': (False, None),
    'tie_word_embeddings': (True,),
    'use_bidirectional_attention': (None, False),
    'quantization_config': (None,),
}
# Far above any Gemma; a file beyond them is broken, and is refused before
# anything of its size is made.
_LARGEST = {
    'vocab_size': 2**20,
    'num_hidden_layers': 200,
    'hidden_size': 2**15,
    'intermediate_size': 2**18,
    'num_attention_heads': 2**10,
    'num_key_value_heads': 2**10,
    'head_dim': 2**12,
}


def read_fields(theirs: Fields) -> GemmaConfig:
  """The shape that the fields of a config.json describe, in our dtypes.

  Fields that do not change what a model computes are left alone.

  Raises:
    ValueError: if they describe what we do not implement; gives every reason,
      one a line.
  """
  family = theirs.get('model_type')
  if not isinstance(family, str) or family not in WEIGHTS:
    raise ValueError(_foreign_family(theirs))
  rope = _rope(theirs)
  problems = [
      *_size_problems(theirs),
      *_kind_problems(theirs),
      *_rope_problems(rope),
      *_number_problems(theirs, ('rms_norm_eps',)),
  ]
  if family == 'gemma2':
    theirs = GEMMA2_DEFAULTS | theirs
    problems += _gemma2_problems(theirs)
  if problems:
    raise ValueError('\n'.join(problems))
  return GemmaConfig(
      **{ours: theirs[name] for name, ours in SIZES.items()},
      family=family,
      rope_theta=float(rope['rope_theta']),
      norm_eps=theirs.get('rms_norm_eps', 1e-6),
      **(_gemma2_fields(theirs) if family == 'gemma2' else {}),
  )


def note(theirs: Fields) -> str:
  """What is read otherwise than it is written; '' = nothing.

  Gemma 1 has 'gelu' by a known mistake; in a Gemma 2 it may be meant.
  """
  if theirs['model_type'] == 'gemma2' and 'gelu' in (
      theirs.get('hidden_activation'),
      theirs.get('hidden_act'),
  ):
    return (
        "hidden_activation is 'gelu'; its tanh form is used, "
        "'gelu_pytorch_tanh', as in every published Gemma"
    )
  return ''


def _foreign_family(theirs: Fields) -> str:
  reason = (
      f'model_type is {shown(theirs.get("model_type"))}; implemented: '
      f'{", ".join(map(repr, WEIGHTS))}'
  )
  if 'auto_map' in theirs:
    reason += (
        '. Its auto_map names code in the folder, which is never run '
        '(no trust_remote_code)'
    )
  return reason


def _rope(theirs: Fields) -> Any:
  """The rotary positions: transformers 4 and 5 keep them in other places.

  4 writes rope_theta beside rope_scaling, 5 rope_parameters. Where a file has
  several, what is written inside goes before what stands beside.
  """
  inner = theirs.get('rope_scaling') or theirs.get('rope_parameters') or {}
  if not isinstance(inner, Mapping):
    return inner
  return {'rope_theta': theirs.get('rope_theta', 10_000.0), **inner}


def _rope_problems(rope: Any) -> Iterator[str]:
  if not isinstance(rope, Mapping):
    yield f'rotary positions are {shown(rope)}; they must be an object or null'
    return
  yield from _number_problems(rope, ('rope_theta',))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  extra = sorted(set(rope) - {'rope_theta', 'rope_type', 'type'})
  if kind != 'default' or extra:
    yield (
        f'rotary positions are of type {shown(kind)} with {shown(extra)}; '
        "implemented: 'default' with rope_theta"
    )


def _number_problems(fields: Fields, names: tuple[str, ...]) -> Iterator[str]:
  """Of fields that, where they are given, are finite numbers above 0."""
  for name in names:
    value = fields.get(name, 1)
    if isinstance(value, bool) or not isinstance(value, int | float):
      yield f'{name} is {shown(value)}; it must be a number'
    elif not 0 < value < 1e30:
      yield f'{name} is {shown(value)}; it must be above 0 and finite'


def _size_problems(theirs: Fields) -> Iterator[str]:
  sizes = {name: theirs.get(name) for name in SIZES}
  bad = {
      name: value
      for name, value in sizes.items()
      if type(value) is not int or not 0 < value <= _LARGEST[name]
  }
  for name, value in bad.items():
    yield (
        f'{name} is {shown(value)}; it must be an integer from 1 to '
        f'{_LARGEST[name]}'
    )
  if bad:
    return
  if theirs['num_attention_heads'] % theirs['num_key_value_heads']:
    yield (
        f'num_key_value_heads={theirs["num_key_value_heads"]} does not divide '
        f'num_attention_heads={theirs["num_attention_heads"]}'
    )
  if theirs['head_dim'] % 2:
    yield f'head_dim={theirs["head_dim"]} is odd; rotation needs halves'


def _kind_problems(theirs: Fields) -> Iterator[str]:
  for name, allowed in _ALLOWED.items():
    if (value := theirs.get(name, allowed[0])) not in allowed:
      yield f'{name} is {shown(value)}; implemented: {allowed}'


def _layer_types(theirs: Fields) -> Any:
  """Which layers slide; files from before the field say nothing."""
  if theirs.get('layer_types') is not None:
    return theirs['layer_types']
  slides = every_other(theirs['num_hidden_layers'])
  return [SLIDING if s else FULL for s in slides]


def _gemma2_problems(theirs: Fields) -> Iterator[str]:
  yield from _number_problems(theirs, ('query_pre_attn_scalar',))
  caps = (name for name in CAPS if theirs[name] is not None)  # null = none
  yield from _number_problems(theirs, tuple(caps))
  window = theirs['sliding_window']
  if window is not None and (type(window) is not int or window < 1):
    yield f'sliding_window is {shown(window)}; it must be an integer above 0'
  types, layers = theirs.get('layer_types'), theirs.get('num_hidden_layers')
  given = types is not None
  if given and (not isinstance(types, list) or len(types) != layers):
    yield f'layer_types is {shown(types)}; it must list {layers} layers'
  elif given and (unknown := sorted(set(map(str, types)) - {SLIDING, FULL})):
    yield f'layer_types holds {shown(unknown)}; implemented: {SLIDING}, {FULL}'
  elif window is None and (not given or SLIDING in types):
    yield 'sliding_window is null; layers that slide need a number of tokens'


def _gemma2_fields(theirs: Fields) -> dict[str, Any]:
  """The fields of `GemmaConfig` that Gemma 2 has beyond Gemma 1."""
  slides = tuple(t == SLIDING for t in _layer_types(theirs))
  window = theirs['sliding_window'] or 0
  return {
      'query_pre_attn_scalar': theirs['query_pre_attn_scalar'],
      **{ours: theirs[name] or 0.0 for name, ours in CAPS.items()},
      'sliding_window': window if any(slides) else 0,
      'sliding_layers': slides if window and any(slides) else (),
  }
