"""Loops and instructions of HLO text."""

import jax
import jax.numpy as jnp

from ma_rlhf_jax.planning import hlo, loops

TEXT = """HloModule jit_f, is_scheduled=true

%cond (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(9)
  %p = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %t = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%t, %limit), direction=LT
}

%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0:T(128)S(1)} get-tuple-element(%p.1), index=1
  %old = s32[] get-tuple-element(%p.1), index=0
  %by = s32[] constant(1)
  %t.1 = s32[] add(%old, %by)
  ROOT %made = (s32[], f32[4]{0}) tuple(%t.1, %x), metadata={op_name="a (b"}
}

%early (p.2: (s32[], pred[])) -> pred[] {
  %limit.2 = s32[] constant(512)
  %p.2 = (s32[], pred[]) parameter(0)
  %t.2 = s32[] get-tuple-element(%p.2), index=0
  %lt.2 = pred[] compare(%t.2, %limit.2), direction=LT
  %all = pred[] get-tuple-element(%p.2), index=1
  %not = pred[] not(%all)
  ROOT %and = pred[] and(%lt.2, %not)
}

%outer (p.3: (s32[], pred[])) -> (s32[], pred[]) {
  %p.3 = (s32[], pred[]) parameter(0)
  %zero = s32[] constant(0)
  %two = s32[] constant(2)
  %next = s32[] add(%p.3#0, %two)
  %init = (s32[], f32[4]{0}, /*index=2*/f32[]) tuple(%zero, %p.3)
  %inner = (s32[], f32[4]{0}) while(%init), condition=%cond, body=%body
  not an instruction at all
  ROOT %r = (s32[], pred[]) tuple(%next, %inner)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %one = s32[] constant(1)
  %copied = s32[]{:S(6)} copy(%one)
  %start = (s32[], pred[]) tuple(%copied, %a)
  %decode = (s32[], pred[]) while(%start), condition=%early, body=%outer
  ROOT %out = f32[4]{0} get-tuple-element(%decode), index=1
}
"""


def test_loops_are_entered_with_their_trips() -> None:
  found = {
      made.name: [(loop.name, loop.trips, loop.may_end_early) for loop in loops]
      for _, made, loops in loops.walk(hlo.parse(TEXT))
  }
  # The counter goes from 1 to 512 by twos.
  decode = ('decode', 256, True)
  assert found['decode'] == []
  assert found['r'] == [decode]
  assert found['made'] == [decode, ('inner', 9, False)]
  assert found['lt'] == [decode, ('inner', 9, False)]


def test_an_element_of_a_tuple_may_have_no_line_of_its_own() -> None:
  lines = hlo.parse(TEXT).computations['outer']
  assert lines['p.3#0'].opcode == 'get-tuple-element'
  assert lines['p.3#0'].arrays == (hlo.Array('s32', (), 0),)
  assert lines['next'].operands == ('p.3#0', 'two')


def test_what_no_line_makes_is_told() -> None:
  assert hlo.parse(TEXT).unread == ()
  other = TEXT.replace('tuple(%copied, %a)', 'tuple(%copied, %lost)')
  assert hlo.parse(other).unread == ('lost',)


def test_shapes_have_types_sizes_and_spaces() -> None:
  module = hlo.parse(TEXT)
  x = module.computations['body']['x']
  assert x.arrays == (hlo.Array('f32', (4,), 1),)
  assert x.operands == ('p.1',)
  init = module.computations['outer']['init']
  assert [a.size for a in init.arrays] == [4, 16, 4]
  assert module.computations['body']['made'].operands == ('t.1', 'x')


def test_of_branches_that_exclude_each_other_the_largest_counts() -> None:
  def function(x: jax.Array, choose: jax.Array) -> jax.Array:
    of = lambda rows: lambda _, x: x.at[:rows].set(x[:rows] @ w)
    loop = lambda rows, trips: jax.lax.fori_loop(0, trips, of(rows), x)
    return jax.lax.cond(choose, lambda: loop(32, 9), lambda: loop(3, 2))

  x, w = jnp.ones((32, 64)), jnp.ones((64, 64))
  compiled = jax.jit(function).lower(x, jnp.bool(True)).compile()
  module = hlo.parse(compiled.as_text())
  dots = lambda lines: [i.arrays[0].dims for i in lines if i.opcode == 'dot']
  every = [lines.values() for lines in module.computations.values()]
  assert sorted(sum(map(dots, every), [])) == [(3, 64), (32, 64)]
  # Products stand alone or in fusions.
  entered = []
  for _, made, _ in loops.walk(module):
    inside = module.computations.get(made.called.get('calls', ''), {})
    entered += dots([made, *inside.values()])
  assert entered == [(32, 64)]
