"""Adapters: what they add, what learns, and what is shared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.config_fields import KERNELS
from ma_rlhf_jax.models import exporting, gemma, heads, huggingface, lora
from ma_rlhf_jax.models.cache import Cache
from ma_rlhf_jax.models.presets import GemmaConfig, Lora
from ma_rlhf_jax.structs import Params
from tests.models.drawn import (
    TINY,
    UNUSUAL,
    draw,
    left_padded,
    loss,
    rounding,
    states,
)

TOKENS, MASK = left_padded([9, 4, 6, 1], 9)
# Every kernel has its own factors, and rank and alpha differ from all sizes.
ALL = Lora(rank=2, alpha=3.0, targets=KERNELS)
SOME = Lora(rank=2, alpha=3.0, targets=('query', 'down'))
CONFIG = dataclasses.replace(TINY, lora=ALL)


def _merged(config: GemmaConfig, params: Params) -> Params:
  """A model without adapters, by plain NumPy sums in float64."""
  flat, out = lora.flatten(params), {}
  for path, x in flat.items():
    if path.endswith(('_lora_a', '_lora_b')):
      continue
    out[path] = np.asarray(x, np.float64)
    if path + '_lora_a' in flat:
      a, b = (np.asarray(flat[path + s]) for s in ('_lora_a', '_lora_b'))
      for layer in range(config.num_layers):
        for r in range(config.lora.rank):
          product = np.multiply.outer(a[layer, ..., r], b[layer, r])
          out[path][layer] += config.lora.alpha / config.lora.rank * product
  return lora.unflatten(
      {k: jnp.asarray(x, jnp.float32) for k, x in out.items()}
  )


@pytest.mark.parametrize('adapters', [ALL, SOME], ids=['all', 'some'])
@pytest.mark.parametrize('family', ['gemma', 'gemma2'])
def test_an_adapter_is_a_product_added_to_its_kernel(
    adapters: Lora, family: str
) -> None:
  config = dataclasses.replace(TINY, family=family, lora=adapters)
  params = draw('policy', config, seed=3)
  plain = dataclasses.replace(config, lora=None)
  merged = _merged(config, params)
  want = states(plain, merged, TOKENS, MASK)
  got = states(config, params, TOKENS, MASK)
  bound = rounding(plain, merged, TOKENS, MASK)
  np.testing.assert_allclose(got[MASK], want[MASK], rtol=0, atol=bound)
  bare = states(plain, lora.without_adapters(params), TOKENS, MASK)
  assert np.abs(bare - want)[MASK].max() > 0.1


def test_fresh_adapters_change_nothing_and_share_the_rest() -> None:
  params = draw('scalar', TINY, seed=1)
  key = jax.random.key(0)
  with_adapters = lora.add_adapters('scalar', CONFIG, params, key)
  want = heads.token_scores(TINY, params, TOKENS, MASK)
  got = heads.token_scores(CONFIG, with_adapters, TOKENS, MASK)
  np.testing.assert_array_equal(got, want)
  flat, before = lora.flatten(with_adapters), lora.flatten(params)
  for path, x in before.items():
    # The head learns here and stays there, so it is the one copy.
    assert (flat[path] is x) == (path != 'head'), path
  factors = flat['backbone/layers/mlp/up_lora_a']
  assert factors.shape == (3, 24, 2)
  # Uniform within 1 / sqrt(24) = 0.204, as peft draws them.
  assert 0.15 < np.abs(factors).max() < 0.2042
  assert not flat['backbone/layers/mlp/up_lora_b'].any()


def test_without_adapters_everything_learns() -> None:
  params = draw('policy', TINY, seed=1)
  assert lora.add_adapters('policy', TINY, params, jax.random.key(0)) is params
  frozen, learning = lora.split(TINY, params)
  assert frozen == {} and learning is params
  assert lora.join(frozen, learning) is params


def test_adapters_and_heads_learn_and_nothing_else() -> None:
  params = draw('scalar', dataclasses.replace(TINY, lora=SOME), seed=1)
  frozen, learning = lora.split(dataclasses.replace(TINY, lora=SOME), params)
  assert set(lora.flatten(learning)) == {
      'head',
      'backbone/layers/attention/query_lora_a',
      'backbone/layers/attention/query_lora_b',
      'backbone/layers/mlp/down_lora_a',
      'backbone/layers/mlp/down_lora_b',
  }
  assert lora.flatten(frozen).keys().isdisjoint(lora.flatten(learning))
  assert lora.flatten(lora.join(frozen, learning)) == lora.flatten(params)
  # Per layer: query 24 * 2 + 2 * 40, down 36 * 2 + 2 * 24; the head 24.
  learns, total = lora.num_learning(
      dataclasses.replace(TINY, lora=SOME), params
  )
  assert learns == 3 * (128 + 120) + 24
  assert total == TINY.num_params + learns


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_kernel() -> None:
  params = draw('policy', CONFIG, seed=3)
  frozen, learning = lora.split(CONFIG, params)

  @jax.jit
  def grads(learning: Params, merged: Params) -> tuple[Params, Params]:
    ours = jax.grad(lambda p: loss(CONFIG, lora.join(frozen, p), TOKENS, MASK))(
        learning
    )
    return ours, jax.grad(lambda p: loss(TINY, p, TOKENS, MASK))(merged)

  ours, theirs = map(lora.flatten, grads(learning, _merged(CONFIG, params)))
  flat = lora.flatten(params)
  for path in ('layers/attention/out', 'layers/mlp/gate'):
    dw, b = np.asarray(theirs[path]), np.asarray(flat[path + '_lora_b'])
    # d/dA of scale A B is scale dW B^T.
    want = 1.5 * np.einsum('x...d,xrd->x...r', dw, b)
    np.testing.assert_allclose(
        ours[path + '_lora_a'], want, rtol=2e-3, atol=2e-3
    )
    assert np.abs(want).max() > 0.1


def test_an_export_holds_the_merged_kernels(tokenizer, tmp_path) -> None:
  config = dataclasses.replace(UNUSUAL, lora=SOME)
  params = draw('scalar', config, seed=5)
  exporting.save(tmp_path / 'hf', params, config, 'scalar', tokenizer)
  found = huggingface.load_params(tmp_path / 'hf', UNUSUAL, 'scalar')
  want = lora.flatten(_merged(config, params))
  # Each of the two rounds a sum of the kernel and of `rank` scaled products.
  sizes = lora.flatten(_merged(config, jax.tree.map(jnp.abs, params)))
  step = (config.lora.rank + 2) * np.finfo(np.float32).eps
  for path, x in lora.flatten(found).items():
    bound = step * sizes[path].max()
    np.testing.assert_allclose(x, want[path], rtol=0, atol=bound, err_msg=path)


def test_a_merge_of_bfloat16_is_rounded_once() -> None:
  kernel = jnp.full((1, 1), 1.0, jnp.bfloat16)
  a, b = jnp.full((1, 3), 2.0**-9), jnp.ones((3, 1))
  # 3 / 512 is below half a step of 1/128 at each term and above it in all.
  merged = lora.merged(kernel, a, b, 1.0)
  assert merged.dtype == jnp.float32
  assert float(merged[0, 0]) == 1 + 3 / 512
  assert float(merged.astype(jnp.bfloat16)[0, 0]) == 1 + 1 / 128


@pytest.mark.slow
def test_decoding_through_adapters_equals_a_whole_pass() -> None:
  config = dataclasses.replace(CONFIG, remat='none')
  params = draw('policy', config, seed=3)
  whole = states(config, params, TOKENS, MASK)
  bound = rounding(config, params, TOKENS, MASK)
  cache = Cache.empty(config, len(TOKENS), TOKENS.shape[1])
  positions = masking.positions(MASK)
  step = jax.jit(gemma.Gemma(config).apply)
  for column in range(TOKENS.shape[1]):
    mask = MASK & (np.arange(TOKENS.shape[1]) <= column)[None]
    hidden, cache = step(
        {'params': params},
        TOKENS[:, column : column + 1],
        positions[:, column : column + 1],
        mask[:, None],
        cache,
        column,
    )
    seen = MASK[:, column]
    np.testing.assert_allclose(
        hidden[seen, 0], whole[seen, column], rtol=0, atol=bound
    )


def test_what_learns_is_told() -> None:
  params = draw('policy', CONFIG, seed=3)
  factors = {
      path: x.size
      for path, x in lora.flatten(params).items()
      if path.endswith(('_lora_a', '_lora_b'))
  }
  learning, total = sum(factors.values()), TINY.num_params
  assert lora.describe(CONFIG, params) == (
      f'rank-2 adapters, {learning:,} of {total + learning:,} parameters'
  )
  bare = lora.without_adapters(params)
  assert lora.describe(TINY, bare) == f'all {total:,} parameters'
