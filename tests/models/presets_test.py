"""Tests of `models.presets`."""

import dataclasses
import math

import jax
import pytest

from ma_rlhf_jax.config import base
from ma_rlhf_jax.models import presets
from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.models.presets import PRESETS, GemmaConfig, from_fields
from tests.models.drawn import TINY

# What the hub says of google/<name>.
PUBLISHED = {
    'gemma-2b': 2_506_172_416,
    'gemma-7b': 8_537_680_896,
    'codegemma-2b': 2_506_172_416,
    'codegemma-7b-it': 8_537_680_896,
    'gemma-2-2b': 2_614_341_888,
    'gemma-2-9b': 9_241_705_984,
    'gemma-2-27b': 27_227_128_320,
}


def _count(kind: str, config: GemmaConfig) -> int:
  leaves = jax.tree.leaves(abstract_params(kind, config))
  return sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize(('name', 'num_params'), PUBLISHED.items())
def test_published_parameter_counts(name: str, num_params: int) -> None:
  config = PRESETS[name]
  assert config.num_params == num_params
  assert _count('policy', config) == num_params  # shapes alone, no memory
  assert _count('scalar', config) == num_params + config.embed_dim


def test_num_params_by_hand() -> None:
  # Embedding 50 * 24, final norm 24; per layer: query and out 24 * 40 each,
  # key and value 24 * 20 each, MLP 3 * 24 * 36, norms 48.
  # 1200 + 24 + 3 * (1920 + 960 + 2592 + 48) = 17784
  assert TINY.num_params == 17_784
  assert _count('policy', TINY) == 17_784


def test_vocabulary_of_the_tokenizer_fills_a_zero() -> None:
  model = base().model
  model.vocab_size, model.head_dim = 0, 6
  assert from_fields(model, 77).vocab_size == 77
  assert from_fields(model, 77).head_dim == 6
  model.vocab_size = 99
  assert from_fields(model, 77).vocab_size == 99


def test_a_preset_decides_the_shape() -> None:
  model = base().model
  model.preset, model.num_layers, model.vocab_size = 'gemma-2-2b', 3, 77
  assert from_fields(model, 99) == PRESETS['gemma-2-2b']
  assert tuple(PRESETS) == tuple(PUBLISHED)


def test_gemma_2_from_fields_slides_in_every_other_layer() -> None:
  model = base().model
  model.family, model.sliding_window, model.num_layers = 'gemma2', 9, 5
  shape = from_fields(model, 77)
  assert shape.sliding_layers == (True, False, True, False, True)
  # Spelt out, as in the config.json that it is written to.
  assert shape.query_pre_attn_scalar == model.head_dim == 32
  model.sliding_window = 0
  assert from_fields(model, 77).sliding_layers == ()


def test_choices_of_a_run_leave_the_shape_alone() -> None:
  config = base()
  config.model.dtype, config.model.param_dtype = 'bfloat16', 'float32'
  config.model.remat, config.model.unroll = 'none', 1
  config.model.embed_dim = TINY.embed_dim + 1
  whole = dataclasses.replace(
      TINY, dtype='bfloat16', param_dtype='float32', remat='none'
  )
  frozen = dataclasses.replace(whole, kernel_dtype='bfloat16')
  assert presets.trained(TINY, config) == whole
  assert presets.frozen(TINY, config.model) == frozen
  config.lora.rank, config.lora.alpha = 4, 6.0
  config.lora.targets = ('up', 'query')
  adapters = presets.Lora(4, 6.0, ('query', 'up'))
  assert adapters.scale == 1.5
  with_adapters = dataclasses.replace(frozen, lora=adapters)
  assert presets.trained(TINY, config) == with_adapters
  # What was chosen before does not matter.
  assert presets.trained_whole(with_adapters, config.model) == whole
