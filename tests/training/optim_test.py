"""Schedules by hand, and one step of AdamW."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.training import optim, update
from tests import tiny


def _optim(**fields) -> ConfigDict:
  block = config_lib.base().ppo.optim
  block.update({'lr': 8.0, 'clip_norm': 0.0, **fields})
  return block


def _rates(num_updates: int, **fields) -> list[float]:
  """The learning rate of every update, and the one that would come next."""
  schedule = optim.learning_rate(_optim(**fields), num_updates)
  return [float(schedule(i)) for i in range(num_updates + 1)]


def test_warm_up_and_decays_by_hand():
  # 12 updates, a third of them warm-up: 8/4, 16/4, 24/4, 8; then 8 steps.
  ramp = [2.0, 4, 6, 8]
  linear = [8.0, 7, 6, 5, 4, 3, 2, 1, 0]
  how = {'warmup_ratio': 1 / 3}
  got = _rates(12, schedule='linear', **how)
  np.testing.assert_allclose(got, ramp + linear, rtol=1e-6)
  got = _rates(12, schedule='constant', **how)
  np.testing.assert_allclose(got, ramp + [8.0] * 9, rtol=1e-6)
  # (1 + cos(pi i / 8)) / 2 at 0, 1/4, 1/2, 3/4, 1 of the way.
  got = _rates(12, schedule='cosine', **how)
  half = 8 * (1 + 2**-0.5) / 2
  want = [8, half, 4, 8 - half, 0]
  np.testing.assert_allclose(got[:4], ramp, rtol=1e-6)
  np.testing.assert_allclose(got[4::2], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_decay_ends_at_the_final_ratio(schedule: str):
  got = _rates(10, schedule=schedule, final_lr_ratio=0.25, warmup_ratio=0.2)
  assert got[:2] == [4, 8]
  np.testing.assert_allclose(got[-1], 2, rtol=1e-6)
  # Half way: 8 - (8 - 2) / 2.
  np.testing.assert_allclose(got[6], 5, rtol=1e-6)


@pytest.mark.parametrize('schedule', optim.SCHEDULES)
def test_short_stages_start_at_the_peak(schedule: str):
  for updates, ratio in ((5, 0.0), (5, 0.2), (1, 0.1), (1, 1.0)):
    got = _rates(updates, schedule=schedule, warmup_ratio=ratio)
    assert got[0] == 8
    assert all(np.isfinite(got)) and max(got) == 8


def test_two_warm_up_updates():
  assert _rates(4, warmup_ratio=0.5, schedule='linear') == [4, 8, 8, 4, 0]


def test_all_but_norm_scales_are_decayed():
  params = tiny.params('scalar', 0)
  flat = jax.tree_util.tree_leaves_with_path(optim.decayed(params))
  left = [jax.tree_util.keystr(path) for path, decay in flat if not decay]
  assert sorted(left) == [
      "['backbone']['final_norm']['scale']",
      "['backbone']['layers']['attention_norm']['scale']",
      "['backbone']['layers']['mlp_norm']['scale']",
  ]
  assert len(flat) == 3 + 9  # embedding, 4 of attention, 3 of the MLP, head


PARAMS = {'norm': {'scale': jnp.array([2.0])}, 'head': jnp.array([3.0, -5.0])}
GRADS = {'norm': {'scale': jnp.array([-0.5])}, 'head': jnp.array([4.0, 2.0])}


def _updates(grads: list, **fields) -> dict:
  """The last update of several."""
  optimizer = optim.make_optimizer(
      _optim(schedule='constant', warmup_ratio=0.0, lr=0.1, **fields), 10
  )
  state = optimizer.init(PARAMS)
  for grad in grads:
    updates, state = optimizer.update(grad, state, PARAMS)
  return updates


def test_first_update_is_the_sign_plus_decay():
  # m / sqrt(v) = g / |g| at the first update; -.1 (sign + .2 p), no decay of
  # the scale.
  updates = _updates([GRADS], weight_decay=0.2)
  want = [-0.1 * (1 + 0.6), -0.1 * (1 - 1)]
  # 1 - .95 loses 20 times what .95 is rounded by; some ten roundings follow.
  bound = 0.1 * (20 + 12) * 2.0**-23
  np.testing.assert_allclose(updates['head'], want, rtol=1e-5, atol=bound)
  np.testing.assert_allclose(updates['norm']['scale'], [0.1], rtol=1e-5)


def test_second_update_uses_both_betas():
  # Gradients 4 then 2, b1 .9, b2 .95:
  # m = (.9 * .1 * 4 + .1 * 2) / (1 - .81) = .56 / .19
  # v = (.95 * .05 * 16 + .05 * 4) / (1 - .9025) = .96 / .0975
  second = jax.tree.map(lambda x: x / 2, GRADS)
  updates = _updates([GRADS, second], weight_decay=0.0)
  want = -0.1 * (0.56 / 0.19) / np.sqrt(0.96 / 0.0975)
  np.testing.assert_allclose(updates['head'], [want] * 2, rtol=1e-5)


def test_clipping_is_by_the_global_norm():
  # Norm sqrt(.25 + 16 + 4) = 4.5. With a huge epsilon an update is
  # proportional to the clipped gradient.
  how = {'weight_decay': 0.0, 'eps': 1e6}
  free = _updates([GRADS], **how)
  clipped = _updates([GRADS], clip_norm=1.5, **how)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a * 3, b, rtol=1e-4),
      clipped,
      free,
  )
  loose = _updates([GRADS], clip_norm=5.0, **how)
  np.testing.assert_allclose(
      optax.tree.norm(loose), optax.tree.norm(free), rtol=1e-6
  )


def test_clipping_holds_no_second_copy_of_the_gradients():
  def temporaries(clip_norm: float) -> int:
    optimizer = optim.make_optimizer(_optim(clip_norm=clip_norm), 10)
    params = {'x': jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}

    def step(params: dict, state: optax.OptState, grads: dict) -> tuple:
      grads = jax.tree.map(lambda x: x @ x, grads)  # not an argument
      updates, state = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporaries(1.5) < 1.1 * 4 * 1000 * 1000
  assert temporaries(0.0) <= temporaries(1.5)


def test_bfloat16_moments_are_rounded_after_each_update():
  how = {'weight_decay': 0.0, 'moment_dtype': 'bfloat16'}
  optimizer = optim.make_optimizer(_optim(**how), 10)
  state = optimizer.init(PARAMS)
  second = jax.tree.map(lambda x: x / 2, GRADS)
  for grads in (GRADS, second):
    _, state = jax.jit(optimizer.update)(grads, state, PARAMS)
  adam = state[0]
  assert adam.mu['head'].dtype == adam.nu['head'].dtype == jnp.bfloat16
  rounded = lambda x: float(jnp.bfloat16(x))
  # As in the test above, each of .1 g, .05 g^2 and their sums rounded once.
  mu = rounded(0.9 * rounded(0.1 * 4) + 0.1 * 2)
  nu = rounded(0.95 * rounded(0.05 * 16) + 0.05 * 4)
  assert float(adam.mu['head'][0]) == mu
  assert float(adam.nu['head'][0]) == nu


def test_bfloat16_moments_follow_gradients_that_fade():
  # Gradients of 4, then of a thousandth of it. Updates are +-lr g / sqrt(v)
  # once v has decayed: it never gets stuck at what it was.
  fades = [GRADS] + [jax.tree.map(lambda x: x / 1000, GRADS)] * 400
  how = {'weight_decay': 0.0, 'eps': 1e-12}
  wide = _updates(fades, **how)
  narrow = _updates(fades, moment_dtype='bfloat16', **how)
  # Of v, .05 * 16 * .95**400 = 1e-9 of 1.6e-5 is left, half of it in the root.
  np.testing.assert_allclose(wide['head'], [-0.1, -0.1], rtol=1e-4)
  np.testing.assert_allclose(narrow['head'], wide['head'], rtol=0.05)


def test_float32_moments_are_as_wide_as_their_weights():
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS)
    state = optim.make_optimizer(_optim(), 10).init(params)
    assert state[0].mu['head'].dtype == state[0].nu['head'].dtype == jnp.float64


_NARROW = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)


def test_float32_moments_of_bfloat16_weights_are_float32():
  optimizer = optim.make_optimizer(_optim(weight_decay=0.0, b2=0.999), 10)
  state = update.init_state(_NARROW, optimizer).opt_state
  grad = jax.tree.map(lambda x: jnp.full_like(x, 1.5), _NARROW)
  changed = jax.jit(optimizer.update)
  for _ in range(3):
    _, state = changed(grad, state, _NARROW)
  adam = state[0]
  assert adam.mu['head'].dtype == adam.nu['head'].dtype == jnp.float32
  # 1 - b^3 of g and of g^2, of which bfloat16 would keep 8 bits.
  np.testing.assert_allclose(adam.mu['head'], 1.5 * (1 - 0.9**3), rtol=1e-5)
  np.testing.assert_allclose(adam.nu['head'], 2.25 * (1 - 0.999**3), rtol=1e-4)


def test_bfloat16_moments_of_bfloat16_weights_are_summed_in_float32():
  optimizer = optim.make_optimizer(
      _optim(weight_decay=0.0, moment_dtype='bfloat16'), 10
  )
  state = optimizer.init(_NARROW)
  assert state[0].mu['head'].dtype == jnp.bfloat16
  grad = jax.tree.map(lambda x: jnp.full_like(x, 1.5), _NARROW)
  for _ in range(2):
    updates, state = jax.jit(optimizer.update)(grad, state, _NARROW)
  assert updates['head'].dtype == jnp.float32
  # Each sum is rounded once, not each term of it.
  rounded = lambda x: float(jnp.bfloat16(x))
  want = rounded(0.9 * rounded(0.1 * 1.5) + 0.1 * 1.5)
  assert float(state[0].mu['head'][0]) == want


def test_the_norm_of_bfloat16_gradients_is_summed_in_float32():
  grads = {'a': jnp.full(3, 1.5, jnp.bfloat16), 'b': jnp.ones(1, jnp.bfloat16)}
  np.testing.assert_allclose(optim.global_norm(grads), 7.75**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ('b2', 'below', 'above'), [(0.95, 0.072, 0.084), (0.98, 0.16, 0.24)]
)
def test_how_far_a_second_moment_in_bfloat16_lags(
    b2: float, below: float, above: float
):
  """The table of `_adam`, for squares that cover two octaves."""
  grads = {'x': jnp.sqrt(jnp.linspace(1.0, 4.0, 4001))}
  block = _optim(b2=b2, moment_dtype='bfloat16', weight_decay=0.0)
  optimizer = optim.make_optimizer(block, 10)

  def at_rest(start: float) -> np.ndarray:
    first = jax.tree.map(lambda g: g * start / (1 - b2) ** 0.5, grads)
    _, state = optimizer.update(first, optimizer.init(grads), grads)
    one = lambda _, state: optimizer.update(grads, state, grads)[1]
    state = jax.jit(lambda s: jax.lax.fori_loop(0, 1500, one, s))(state)
    nu = state[0].nu['x']
    return np.asarray(nu.astype(jnp.float32) / jnp.square(grads['x']) - 1)

  low, high = at_rest(0.1).min(), at_rest(10.0).max()
  # Rounded to thousandths, and steps of bfloat16 are 1/256 to 1/128 apart.
  assert low == pytest.approx(-below, abs=0.005)
  assert high == pytest.approx(above, abs=0.005)
