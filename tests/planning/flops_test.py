"""Operations of small functions, with the sums in comments."""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import pytest

from ma_rlhf_jax.planning import flops
from ma_rlhf_jax.rollout import decode
from tests import tiny

_X = jnp.ones((3, 5))
_W = jnp.ones((5, 5))
_ONCE = 2 * 3 * 5 * 5


def _count(f: Callable, *args: jax.Array, default: int = 1) -> int:
  return flops.count(jax.make_jaxpr(f)(*args), default_trips=default)


def _scan(x: jax.Array, w: jax.Array) -> jax.Array:
  return lax.scan(lambda c, _: (c @ w, None), x, length=7)[0]


def _early(x: jax.Array, w: jax.Array, limit: int = 9) -> jax.Array:
  """A decode loop: 1 to `limit`, or until all are done."""
  bound = jnp.minimum(limit, 9)
  go_on = lambda s: (s[0] < bound) & ~jnp.all(s[1] > 1e9)
  return lax.while_loop(go_on, lambda s: (s[0] + 1, s[1] @ w), (1, x))[1]


def test_products_count_their_contracted_axes() -> None:
  a, b = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 6))
  assert _count(lambda a, b: a @ b, a, b) == 2 * (2 * 3 * 6) * 4


def test_a_convolution_counts_its_window() -> None:
  image, kernel = jnp.ones((1, 2, 8, 8)), jnp.ones((3, 2, 5, 5))
  f = lambda x, k: lax.conv(x, k, (1, 1), 'VALID')
  assert _count(f, image, kernel) == 2 * (3 * 4 * 4) * (2 * 5 * 5)


def test_loops_count_all_their_trips() -> None:
  assert _count(_scan, _X, _W) == 7 * _ONCE
  assert _count(jax.jit(_scan), _X, _W) == 7 * _ONCE


@pytest.mark.parametrize('limit', [9, 6])
def test_the_bound_of_a_while_loop_is_followed(limit: int) -> None:
  f = lambda x, w: _early(x, w, limit)
  assert _count(f, _X, _W, default=99) == (limit - 1) * _ONCE


def test_an_unknown_bound_takes_the_default() -> None:
  assert _count(_early, _X, _W, jnp.asarray(4), default=99) == 99 * _ONCE


def test_recomputation_is_counted() -> None:
  f = lambda x, w: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w))
  both = lambda f: jax.value_and_grad(f, (0, 1))
  # Forward 2 products, backward 4; the recomputed forward 2 more.
  assert _count(both(f), _X, _W) == 6 * _ONCE
  assert _count(both(jax.checkpoint(f)), _X, _W) == 8 * _ONCE


def test_what_nobody_reads_is_not_counted() -> None:
  f = lambda x, w: (jnp.sum(jnp.sin(x @ w)), x @ w @ w)
  assert _count(lambda x, w: f(x, w)[0], _X, _W) == _ONCE


def test_a_branch_counts_as_the_longest() -> None:
  f = lambda x, w: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)
  assert _count(f, _X, _W) == 2 * _ONCE


def test_shards_count_for_every_device() -> None:
  mesh = tiny.mesh(4, 2, 1)
  spec = PartitionSpec('data')
  f = jax.shard_map(
      lambda x, w: x @ w,
      mesh=mesh,
      in_specs=(spec, PartitionSpec()),
      out_specs=spec,
      axis_names={'data'},
  )
  x = jnp.ones((12, 5))
  assert _count(f, x, _W) == 2 * 12 * 5 * 5


def test_stages_of_decoding_count_their_own_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  found, trips = [], flops.while_trips

  def noted(*args: object) -> int:
    found.append(trips(*args))
    return found[-1]

  monkeypatch.setattr(flops, 'while_trips', noted)
  settings = decode.SamplingSettings(128, tiny.EOS, tiny.PAD)
  params = tiny.params('policy', 0)
  draw = lambda prompts, keys_B: decode.generate(
      tiny.SHAPE, params, prompts, keys_B, settings
  )
  keys_B = jax.random.split(jax.random.key(0), 4)
  flops.count(jax.make_jaxpr(draw)(tiny.prompts([0, 1, 2, 3]), keys_B))
  # Up to token 64, the first of which comes with the prompts, and up to 128 for
  # all rows or for a half of them.
  assert found == [63, 64, 64]
