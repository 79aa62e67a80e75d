"""Tests of `models.presets`."""

import math

import jax
import pytest

from ma_rlhf_jax.config import base
from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.models.presets import PRESETS, GemmaConfig, from_config
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
  assert from_config(model, 77).vocab_size == 77
  assert from_config(model, 77).head_dim == 6
  model.vocab_size = 99
  assert from_config(model, 77).vocab_size == 99


def test_a_preset_decides_the_shape() -> None:
  model = base().model
  model.preset, model.num_layers, model.vocab_size = 'gemma-2-2b', 3, 77
  assert from_config(model, 99) == PRESETS['gemma-2-2b']
  assert tuple(PRESETS) == tuple(PUBLISHED)


def test_gemma_2_from_config_slides_in_every_other_layer() -> None:
  model = base().model
  model.family, model.sliding_window, model.num_layers = 'gemma2', 9, 5
  shape = from_config(model, 77)
  assert shape.sliding_layers == (True, False, True, False, True)
  # Spelt out, as in the config.json that it is written to.
  assert shape.query_pre_attn_scalar == model.head_dim == 32
  model.sliding_window = 0
  assert from_config(model, 77).sliding_layers == ()
