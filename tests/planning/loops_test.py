"""Trips of loops, as the jax at hand and other releases write them."""

from collections.abc import Callable
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ma_rlhf_jax.planning import child, compiling, hlo, loops, traffic

_X = jax.ShapeDtypeStruct((8, 8), jnp.float32)


def _scan(x: jax.Array) -> jax.Array:
  return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, length=7)[0]


def _from_three(x: jax.Array) -> jax.Array:
  return jax.lax.fori_loop(3, 12, lambda i, c: jnp.tanh(c @ c) * i, x)


def _nested(x: jax.Array) -> jax.Array:
  inner = lambda i, c: jax.lax.fori_loop(
      0, 5, lambda j, c: jnp.tanh(c @ c) * j, c + i
  )
  return jax.lax.fori_loop(0, 11, inner, x)


def _by_twos(x: jax.Array) -> jax.Array:
  step = lambda s: (s[0] + 2, jnp.tanh(s[1] @ s[1]))
  return jax.lax.while_loop(lambda s: s[0] < 15, step, (0, x))[1]


def _down(x: jax.Array) -> jax.Array:
  step = lambda s: (s[0] - 1, jnp.tanh(s[1] @ s[1]))
  return jax.lax.while_loop(lambda s: s[0] > 4, step, (10, x))[1]


def _draws(x: jax.Array) -> jax.Array:
  """Goes on like decoding: until all rows have ended, at most to 29."""

  def step(s: tuple) -> tuple:
    made = jnp.tanh(s[1] @ s[1]) + 1
    return s[0] + 1, made, s[2] | (made[:, 0] > 0)

  until = lambda s: (s[0] < 29) & ~jnp.all(s[2])
  return jax.lax.while_loop(until, step, (1, x, jnp.zeros(8, bool)))[1]


def _goes_on(x: jax.Array) -> jax.Array:
  """A second loop goes on where the first ends, as stages of decoding do."""
  step = lambda s: (s[0] + 1, jnp.tanh(s[1] @ s[1]))
  until = lambda last: lambda s: (s[0] < last) & (s[1][0, 0] < 1e9)
  state = jax.lax.while_loop(until(6), step, (1, x))
  return jax.lax.while_loop(until(20), step, state)[1]


_LOOPS = {
    _scan: {(7, False)},
    _from_three: {(9, False)},
    _nested: {(5, False), (11, False)},
    _by_twos: {(8, False)},  # 0, 2, ... 14
    _down: {(6, False)},
    _draws: {(28, True)},
    _goes_on: {(5, True), (14, True)},
}


def _found(text: str) -> set[tuple[int, bool]]:
  module = hlo.parse(text)
  assert module.unread == () and loops.uncounted(module) == ()
  around = [loop for _, _, found in loops.walk(module) for loop in found]
  return {(loop.trips, loop.may_end_early) for loop in around}


@pytest.mark.parametrize('loop', _LOOPS, ids=lambda loop: loop.__name__)
def test_loops_of_known_length_are_counted(
    loop: Callable[[jax.Array], jax.Array],
) -> None:
  text = jax.jit(loop).lower(_X).compile().as_text()
  assert _found(text) == _LOOPS[loop]


def test_a_loop_without_a_bound_is_not_counted() -> None:
  until = lambda s: s[0, 0] < 1e9
  endless = lambda x: jax.lax.while_loop(until, lambda s: s @ s + 1, x)
  module = hlo.parse(jax.jit(endless).lower(_X).compile().as_text())
  assert len(loops.uncounted(module)) == 1
  (loop,) = {x for _, _, found in loops.walk(module) for x in found}
  assert (loop.trips, loop.may_end_early, loop.counted) == (1, True, False)


# Three layers of a stack, read in a loop, as libtpu writes it for jaxlib 0.10
# and, without a line for each element, for jaxlib 0.12.
_OLD = """
%cond (s: (s32[], f32[3,64])) -> pred[] {
  %limit = s32[] constant(3)
  %s = (s32[], f32[3,64]{1,0}) parameter(0)
  %t = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%t, %limit), direction=LT
}

%cut (a: f32[3,64], b: s32[]) -> f32[1,64] {
  %a = f32[3,64]{1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %ds = f32[1,64]{1,0} dynamic-slice(%a, %b), dynamic_slice_sizes={1,64}
}

%body (s.1: (s32[], f32[3,64])) -> (s32[], f32[3,64]) {
  %s.1 = (s32[], f32[3,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s.1), index=0
  %stack = f32[3,64]{1,0} get-tuple-element(%s.1), index=1
  %layer = f32[1,64]{1,0} fusion(%stack, %i), kind=kLoop, calls=%cut
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %r = (s32[], f32[3,64]{1,0}) tuple(%next, %stack)
}

ENTRY %main (x: f32[3,64]) -> f32[3,64] {
  %x = f32[3,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[3,64]{1,0}) tuple(%zero, %x)
  %w = (s32[], f32[3,64]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %y = f32[3,64]{1,0} get-tuple-element(%w), index=1
}
"""
_NEW = '\n'.join(
    line for line in _OLD.splitlines() if 'get-tuple-element(%s' not in line
)
for _name, _element in (('t', 's#0'), ('i', 's.1#0'), ('stack', 's.1#1')):
  for _end in ',)':
    _NEW = _NEW.replace(f'%{_name}{_end}', f'%{_element}{_end}')


def test_bytes_do_not_depend_on_how_elements_are_written() -> None:
  old, new = hlo.parse(_OLD), hlo.parse(_NEW)
  assert 's.1#1' in _NEW and '%stack' not in _NEW
  assert _found(_NEW) == _found(_OLD) == {(3, False)}
  # Three trips: a layer of 256 bytes is read and written and its number of 4
  # read, two numbers are added into a third, two compared into a byte.
  assert traffic.hbm_bytes(old) == 3 * (256 + 256 + 4 + 12 + 9)
  assert traffic.hbm_bytes(new) == traffic.hbm_bytes(old)


@pytest.fixture(scope='module')
def of_tpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Where each loop lies in a folder, as libtpu wrote it."""
  made = tmp_path_factory.mktemp('loops')
  call = [sys.executable, '-m', 'tests.planning.loops_test', str(made)]
  env = os.environ | compiling.ENVIRONMENT
  subprocess.run(call, env=env, check=True, capture_output=True, timeout=500)
  return made


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="needs libtpu: pip install -e '.[plan]'",
)
@pytest.mark.parametrize('loop', _LOOPS, ids=lambda loop: loop.__name__)
def test_loops_of_known_length_are_counted_for_tpus(
    loop: Callable[[jax.Array], jax.Array], of_tpus: pathlib.Path
) -> None:
  (dumped,) = (of_tpus / loop.__name__).glob(compiling.SCHEDULED)
  assert _found(dumped.read_text()) == _LOOPS[loop]


def _compile_for_tpus(folder: str) -> None:
  """In a process of its own, which loads libtpu."""
  device = child.devices_of('v5e:1x1')[0]
  where = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct(_X.shape, _X.dtype, sharding=where)
  for loop in _LOOPS:
    place = str(pathlib.Path(folder) / loop.__name__)
    options = {'xla_dump_to': place, 'xla_dump_hlo_as_text': True}
    jax.jit(loop).lower(x).compile(compiler_options=options)


if __name__ == '__main__':
  _compile_for_tpus(sys.argv[1])
