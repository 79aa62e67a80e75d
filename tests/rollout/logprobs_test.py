"""Chunked log-probs: the values, the gradients and the memory."""

from collections.abc import Callable
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.rollout import scoring
from ma_rlhf_jax.rollout.logprobs import token_logprobs
from ma_rlhf_jax.structs import Array, SequenceBatch
from tests import tiny, tolerance

B, T, D, V = 3, 7, 5, 11
_chunked = functools.partial(token_logprobs, with_entropy=True)


def _inputs(dtype: str = 'float32') -> tuple[Array, Array, Array]:
  random = np.random.default_rng(0)
  hidden, embedding = random.normal(size=(B, T, D)), random.normal(size=(V, D))
  tokens = random.integers(0, V, (B, T)).astype(np.int32)
  return jnp.asarray(hidden, dtype), jnp.asarray(embedding, dtype), tokens


def _plain(
    hidden: Array,
    embedding: Array,
    tokens: Array,
    *,
    softcap: float,
    temperature: float,
    chunk_tokens: int = 0,
) -> tuple[Array, Array]:
  """All logits at once."""
  del chunk_tokens
  logits = jnp.einsum('btd,vd->btv', hidden, embedding)
  if softcap:
    logits = softcap * jnp.tanh(logits / softcap)
  logits = logits / temperature
  logp = jax.nn.log_softmax(logits, axis=-1)
  entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
  return jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0], entropy


def _cost(
    hidden: Array, embedding: Array, tokens: Array, function: Callable, **how
) -> tuple[Array, tuple[Array, Array]]:
  """A sum in which every token's log-prob and entropy weighs differently."""
  logprobs, entropy = function(hidden, embedding, tokens, **how)
  weights = jnp.cos(jnp.arange(tokens.size)).reshape(tokens.shape)
  return jnp.sum(weights * (logprobs - 0.3 * entropy)), (logprobs, entropy)


_run = jax.jit(
    jax.value_and_grad(_cost, argnums=(0, 1), has_aux=True),
    static_argnames=('function', 'softcap', 'temperature', 'chunk_tokens'),
)


def test_by_hand():
  # Logits 0, log 2, log 5: 1/8, 2/8, 5/8. At temperature 1/2 they double:
  # 1/30, 4/30, 25/30.
  hidden = jnp.ones((1, 3, 1))
  embedding = jnp.log(jnp.array([[1.0], [2.0], [5.0]]))
  tokens = jnp.array([[2, 0, 1]])
  for temperature, probs in ((1.0, [5, 1, 2]), (0.5, [25, 1, 4])):
    p = np.array(probs) / sum(probs)
    how = {'softcap': 0.0, 'temperature': temperature, 'chunk_tokens': 2}
    logprobs, entropy = _chunked(hidden, embedding, tokens, **how)
    # Some ten roundings of numbers below 4, the log of the sum among them.
    bound = 10 * 4 * 2.0**-24
    np.testing.assert_allclose(logprobs, [np.log(p)], rtol=0, atol=bound)
    want = [-(p @ np.log(p))] * 3
    np.testing.assert_allclose(entropy[0], want, rtol=0, atol=bound)


# 21 tokens against blocks of 1, 4 (4 + 4 + 3), 6 (6 + 5), 11 and 11 rows.
@pytest.mark.parametrize(
    ('chunk_tokens', 'softcap'),
    [(1, 0.0), (8, 0.0), (8, 1.5), (15, 0.0), (21, 1.5), (1000, 0.0)],
)
def test_any_chunk_equals_all_logits_at_once(chunk_tokens: int, softcap: float):
  how = {'temperature': 0.7, 'softcap': softcap}
  (_, want), want_grads = _run(*_inputs(), function=_plain, **how)
  (_, got), grads = _run(
      *_inputs(), function=_chunked, chunk_tokens=chunk_tokens, **how
  )
  assert got[0].shape == got[1].shape == (B, T)
  hidden, embedding, tokens = _inputs()
  plain = lambda *x: _run(*x, tokens, function=_plain, **how)
  bounds = tolerance.of_sums(plain, (hidden, embedding), B * T * V)
  tolerance.assert_close((got, grads), (want, want_grads), bounds[1:])


# What each mesh does with a table of 24 rows: whole on every device; in groups
# of 8 parts, of 3; in 8 shards; in 2 shards of 2; of 5 rows in 4 parts, padded.
@pytest.mark.parametrize(
    ('sizes', 'vocab'),
    [
        ((8, 1, 1), 24),
        ((1, 8, 1), 24),
        ((1, 1, 8), 24),
        ((2, 2, 2), 24),
        ((1, 4, 2), 10),
    ],
    ids=str,
)
def test_a_mesh_changes_no_value_and_no_gradient(sizes: tuple, vocab: int):
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  inputs = draw(8, T, 16), draw(vocab, 16)
  inputs += (random.integers(0, vocab, (8, T)).astype(np.int32),)
  how = {'softcap': 3.0, 'temperature': 0.7, 'chunk_tokens': 4}
  alone = _run(*inputs, function=_plain, **how)
  mesh = tiny.mesh(*sizes)
  rows = P(('data', 'fsdp'))
  specs = rows, P('tensor', 'fsdp'), rows
  with jax.set_mesh(mesh):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    spread = _run(*map(put, inputs, specs), function=_chunked, **how)
  table = spread[1][1]  # its gradient stays split
  rows, columns = vocab // sizes[2], 16 // sizes[1]
  assert table.sharding.shard_shape(table.shape) == (rows, columns)
  plain = lambda *x: _run(*x, inputs[2], function=_plain, **how)
  bounds = tolerance.of_sums(plain, inputs[:2], 8 * T * vocab)
  tolerance.assert_close(spread, alone, bounds)


def test_without_entropy_it_is_zero_and_log_probs_are_the_same():
  how = {'softcap': 3.0, 'temperature': 1.3, 'chunk_tokens': 8}
  logprobs, entropy = token_logprobs(*_inputs(), **how)
  assert not entropy.any()
  want = _chunked(*_inputs(), **how)[0]
  np.testing.assert_allclose(logprobs, want, rtol=1e-6)


def test_permuted_rows_permute_the_result():
  hidden, embedding, tokens = _inputs()
  order = np.array([2, 0, 1])
  how = {'softcap': 3.0, 'temperature': 1.3, 'chunk_tokens': 8}
  base = _chunked(hidden, embedding, tokens, **how)
  moved = _chunked(hidden[order], embedding, tokens[order], **how)
  for got, want in zip(moved, base, strict=True):
    np.testing.assert_allclose(got, want[order], rtol=1e-6)


def test_nan_on_padding_stays_there():
  hidden, embedding, tokens = _inputs()
  how = {'softcap': 3.0, 'temperature': 1.3, 'chunk_tokens': 8}
  base, _ = _chunked(hidden, embedding, tokens, **how)
  got, _ = _chunked(hidden.at[1, 4:].set(math.nan), embedding, tokens, **how)
  assert np.isnan(got[1, 4:]).all()
  real = np.ones((B, T), bool)
  real[1, 4:] = False
  np.testing.assert_allclose(got[real], base[real], rtol=1e-6)


def test_bfloat16_is_accumulated_in_float32():
  # Products of two bfloat16 numbers are exact in float32, so the result is
  # that of the same numbers in float32; sums in bfloat16 are off by 1e-2.
  hidden, embedding, tokens = _inputs('bfloat16')
  how = {'softcap': 0.0, 'temperature': 1.0, 'chunk_tokens': 8}
  got = _chunked(hidden, embedding, tokens, **how)
  wide = hidden.astype(jnp.float32), embedding.astype(jnp.float32)
  want = _plain(*wide, tokens, **how)
  assert got[0].dtype == got[1].dtype == jnp.float32
  exact = lambda *x: _plain(*x, tokens, **how)
  tolerance.assert_close(got, want, tolerance.of_sums(exact, wide, V))


def test_float64_stays_float64():
  with jax.enable_x64(True):
    how = {'softcap': 2.0, 'temperature': 0.7, 'chunk_tokens': 8}
    got = _chunked(*_inputs('float64'), **how)
    want = _plain(*_inputs('float64'), **how)
    assert got[0].dtype == got[1].dtype == jnp.float64
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


# 2,048 response tokens in chunks of 64: all logits are 32 chunks.
_ROWS, _RESPONSE, _CHUNK = 64, 32, 64


def _compiled(vocab_size: int, function: Callable) -> jax.stages.Compiled:
  """The log-prob pass of a model, its entropies and its gradient."""
  shape = dataclasses.replace(
      tiny.SHAPE,
      vocab_size=vocab_size,
      num_layers=1,
      num_heads=1,
      logprob_chunk=_CHUNK,
  )
  array = jax.ShapeDtypeStruct
  batch = SequenceBatch(
      tokens_BL=array((_ROWS, 4 + _RESPONSE), jnp.int32),
      mask_BL=array((_ROWS, 4 + _RESPONSE), jnp.bool),
      response_mask_BT=array((_ROWS, _RESPONSE), jnp.bool),
  )

  def cost(params, batch):
    logprobs_BT, entropy_BT = scoring.response_logprobs(
        shape,
        params,
        batch,
        temperature=0.7,
        with_entropy=True,
    )
    return jnp.sum(jnp.sin(logprobs_BT)), entropy_BT

  run = jax.jit(function(cost, has_aux=True) if function else cost)
  return run.lower(abstract_params('policy', shape), batch).compile()


def _largest(compiled: jax.stages.Compiled) -> int:
  """Entries of the largest array that the compiled program names."""
  shapes = re.findall(r'\w\[([\d,]+)\]', compiled.as_text())
  return max(math.prod(map(int, dims.split(','))) for dims in shapes)


def _temporaries(compiled: jax.stages.Compiled) -> int:
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    'function',
    [
        pytest.param(None, id='pass'),
        pytest.param(jax.grad, id='grad', marks=pytest.mark.slow),
    ],
)
def test_temporaries_do_not_grow_with_tokens_times_vocabulary(
    function: Callable | None,
):
  small, large = 4096, 16384
  programs = {v: _compiled(v, function) for v in (small, large)}
  grown = _temporaries(programs[large]) - _temporaries(programs[small])
  # Two arrays of logits of one chunk, 4 bytes each. The gradient of the table,
  # to which that of the look-up is added, is a result and never a temporary.
  assert grown <= 4 * 2 * _CHUNK * (large - small)
  for vocab_size, program in programs.items():
    bound = max(_CHUNK, tiny.SHAPE.embed_dim) * vocab_size
    assert _largest(program) <= bound < _ROWS * _RESPONSE * vocab_size / 16


def test_all_logits_at_once_would_be_seen(monkeypatch: pytest.MonkeyPatch):
  def at_once(*args, with_entropy, **how):
    return _plain(*args, **how)

  monkeypatch.setattr(scoring, 'token_logprobs', at_once)
  small, large = (_compiled(v, None) for v in (4096, 16384))
  tokens = _ROWS * _RESPONSE
  assert _largest(large) >= tokens * 16384
  grown = _temporaries(large) - _temporaries(small)
  assert grown >= 4 * tokens * (16384 - 4096)
