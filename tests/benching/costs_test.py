"""FLOPs and bytes by hand."""

import dataclasses

import numpy as np

from ma_rlhf_jax.benching import costs
from ma_rlhf_jax.models.presets import PRESETS, GemmaConfig

# 10 words of 4 numbers, one layer, heads of 2, MLP of 3.
SHAPE = GemmaConfig(10, 1, 4, 3, 2, 1, 2)


def test_a_forward_pass_by_hand() -> None:
  # Norms 3 x 4; q and o 4 x 4 each, k and v 4 x 2 each; MLP 3 x 12.
  assert costs.body_params(SHAPE) == 12 + 32 + 16 + 36
  prompts, responses = np.array([2, 1]), np.array([1, 3])
  # 3 and 4 tokens: 6 + 10 pairs of query and key.
  body = 2 * 96 * 7 + 4 * 1 * 4 * 16
  assert costs.forward(SHAPE, prompts, responses, head=False) == body
  head = 2 * 40 * 4
  assert costs.forward(SHAPE, prompts, responses, head=True) == body + head


def test_decoding_by_hand() -> None:
  prompts, responses = np.array([2, 1]), np.array([1, 3])
  flops, moved = costs.decode(SHAPE, prompts, responses)
  # The responses are 1 + 3 tokens; their pairs are 3 and 2 + 3 + 4.
  assert flops == 2 * 96 * 4 + 4 * 4 * 12 + 2 * 40 * 4
  # Three steps read all weights; slots of 2 x 2 numbers are read 2, 1 + 2 + 3
  # times.
  assert moved == 4 * (3 * SHAPE.num_params + 8 * 4)


def test_gemma_2b_at_its_size() -> None:
  shape = dataclasses.replace(PRESETS['gemma-2b'], dtype='bfloat16')
  full = np.full(256, 512)
  flops, moved = costs.decode(shape, full, full)
  # 18,432 bytes a slot; 5 GB of weights a step.
  assert abs(moved / 512 - (5.01e9 + 256 * 767.5 * 18_432)) < 1e8
  assert 1.2e12 < flops / 512 < 1.5e12
