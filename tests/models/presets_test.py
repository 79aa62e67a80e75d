"""Tests of `models.presets`."""

import dataclasses
import math

import jax
import pytest

from ma_rlhf_jax.config import base
from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.models.presets import GemmaConfig, from_fields, with_runtime
from tests.models.drawn import TINY

# google/gemma-2b and google/gemma-7b: config.json and the published counts.
GEMMA_2B = GemmaConfig(256_000, 18, 2048, 16_384, 8, 1, 256)
GEMMA_7B = GemmaConfig(256_000, 28, 3072, 24_576, 16, 16, 256)
PUBLISHED = [(GEMMA_2B, 2_506_172_416), (GEMMA_7B, 8_537_680_896)]


def _count(kind: str, config: GemmaConfig) -> int:
  leaves = jax.tree.leaves(abstract_params(kind, config))
  return sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize(('config', 'num_params'), PUBLISHED)
def test_published_parameter_counts(
    config: GemmaConfig, num_params: int
) -> None:
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


def test_runtime_changes_dtypes_and_remat_only() -> None:
  model = base().model
  model.dtype, model.param_dtype, model.remat = 'bfloat16', 'float16', False
  model.embed_dim = TINY.embed_dim + 1
  assert with_runtime(TINY, model) == dataclasses.replace(
      TINY, dtype='bfloat16', param_dtype='float16', remat=False
  )
