"""FLOPs and bytes that the work needs, whatever a program spends on it.

A forward pass takes 2 FLOPs a parameter and token, and attention 4 * H * N
times the keys that a query sees; a backward pass twice that. Padding and
recomputing are no part of it, so model-FLOP utilisation counts them as lost.
"""

import numpy as np

from ma_rlhf_jax.models.presets import GemmaConfig


def body_params(shape: GemmaConfig) -> int:
  """Parameters without the embedding."""
  return shape.num_params - shape.vocab_size * shape.embed_dim


def forward(
    shape: GemmaConfig, prompts: np.ndarray, responses: np.ndarray, head: bool
) -> float:
  """FLOPs of one forward pass over prompts with their responses.

  Args:
    shape: of the model.
    prompts: real tokens [B].
    responses: real tokens [B].
    head: whether response tokens reach the vocabulary.
  """
  tokens = (prompts + responses).astype(np.float64)
  pairs = float(np.sum(tokens * (tokens + 1) / 2))
  heads = shape.num_heads * shape.head_dim
  total = 2.0 * body_params(shape) * float(tokens.sum())
  total += 4.0 * shape.num_layers * heads * pairs
  if head:
    vocabulary = shape.vocab_size * shape.embed_dim
    total += 2.0 * vocabulary * float(responses.sum())
  return total


def decode(
    shape: GemmaConfig, prompts: np.ndarray, responses: np.ndarray
) -> tuple[float, float]:
  """(FLOPs, bytes) of drawing the responses once the prompts are read.

  Each step reads all weights, and the filled slots of the rows that go on.
  """
  whole = forward(shape, prompts, responses, head=True)
  flops = whole - forward(shape, prompts, 0 * responses, head=False)
  item = shape.compute_dtype.itemsize
  slot = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * item
  steps = int(responses.max())
  kept = np.sum(prompts * responses + responses * (responses - 1) / 2)
  return flops, float(steps) * shape.num_params * item + float(kept) * slot
