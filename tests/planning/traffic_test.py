"""Bytes on the wire and in HBM, of text with sums in comments."""

import pytest

from ma_rlhf_jax.planning import hlo, traffic

_CONDITION = """
%cond (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[] constant(3)
  %p = (s32[], f32[4]) parameter(0)
  %t = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%t, %limit), direction=LT
}
"""
_SENT = _CONDITION + """
%start.1 (q: bf16[1,10]) -> (bf16[1,10], bf16[4,10]) {
  %q = bf16[1,10]{1,0} parameter(0)
  %ag.1 = bf16[4,10]{1,0} all-gather(%q), channel_id=5, \
replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  ROOT %cc = (bf16[1,10], bf16[4,10]) custom-call(%ag.1), \
custom_call_target="AsyncCollectiveStart"
}

%done.1 (q.1: bf16[4,10]) -> bf16[4,10] {
  %q.1 = bf16[4,10]{1,0} parameter(0)
  ROOT %ag.2 = bf16[4,10]{1,0} all-gather(%q.1), channel_id=5, \
replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
}

%all-reduce-scatter.1 (q.2: f32[80]) -> f32[10] {
  %q.2 = f32[80]{0} parameter(0)
  %ar.1 = f32[80]{0} all-reduce(%q.2), channel_id=6, \
replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %ds = f32[10]{0} dynamic-slice(%ar.1), dynamic_slice_sizes={10}
}

%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]) parameter(0)
  %a = bf16[1,10]{1,0} get-tuple-element(%p.1), index=1
  %async-collective-start.1 = (bf16[1,10]{1,0}, bf16[4,10]{1,0}) fusion(%a), \
kind=kCustom, calls=%start.1
  %async-collective-done.1 = bf16[4,10]{1,0} fusion(\
%async-collective-start.1), kind=kCustom, calls=%done.1
  %rs = f32[10]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %r = (s32[], f32[4]) tuple(%x, %y)
}

ENTRY %main (a.1: f32[80]) -> f32[80] {
  %a.1 = f32[80]{0} parameter(0)
  %w = (s32[], f32[4]) while(%a.1), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %cp = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%z), \
channel_id=9, source_target_pairs={{0,1}}
  ROOT %ar = (f32[5]{0}, bf16[4]{0}) all-reduce(%c, %d), channel_id=7, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add, \
metadata={op_name="jit(f)/loss"}
}
"""


def test_every_kind_of_collective_is_weighed_and_counted() -> None:
  found = {c.kind: c for c in traffic.collectives(hlo.parse(_SENT))}
  assert len(found) == 4
  gather = found['all-gather']  # in two fusions, one channel
  assert (gather.group, gather.count) == (4, 3)
  assert gather.total == pytest.approx(3 * 3 / 4 * 80)
  scatter = found['reduce-scatter']
  assert scatter.total == pytest.approx(3 * 7 / 8 * 320)
  assert found['collective-permute'].total == 24
  reduce = found['all-reduce']
  assert reduce.total == pytest.approx(2 * 7 / 8 * (20 + 8))
  assert reduce.op_name == 'jit(f)/loss'


_MOVED = _CONDITION + """
%slice (s.0: bf16[28,100], s.1: s32[]) -> bf16[1,100] {
  %s.0 = bf16[28,100]{1,0} parameter(0)
  %s.1 = s32[] parameter(1)
  ROOT %ds = bf16[1,100]{1,0} dynamic-slice(%s.0, %s.1), \
dynamic_slice_sizes={1,100}
}

%put (u.0: bf16[28,100], u.1: bf16[1,100], u.2: s32[]) -> bf16[28,100] {
  %u.0 = bf16[28,100]{1,0} parameter(0)
  %u.1 = bf16[1,100]{1,0} parameter(1)
  %u.2 = s32[] parameter(2)
  ROOT %dus = bf16[28,100]{1,0} dynamic-update-slice(%u.0, %u.1, %u.2)
}

%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]) parameter(0)
  %stack = bf16[28,100]{1,0} get-tuple-element(%p.1), index=1
  %i = s32[]{:S(6)} get-tuple-element(%p.1), index=0
  %layer = bf16[1,100]{1,0} fusion(%stack, %i), kind=kLoop, calls=%slice
  %vmem = bf16[1,100]{1,0:S(1)} fusion(%stack, %i), kind=kLoop, calls=%slice
  %new = bf16[28,100]{1,0} fusion(%stack, %layer, %i), kind=kLoop, calls=%put
  ROOT %r = (s32[], f32[4]) tuple(%i, %new)
}

%outside (o.0: bf16[28,100], o.1: s32[]) -> bf16[28,100] {
  %o.0 = bf16[28,100]{1,0} parameter(0)
  %o.1 = s32[] parameter(1)
  %flat = bf16[28,100]{1,0} bitcast(%o.0)
  %cut = bf16[1,100]{1,0} fusion(%flat, %o.1), kind=kLoop, calls=%slice
  %into = bf16[28,100]{1,0} fusion(%o.0, %cut, %o.1), kind=kLoop, calls=%put
  ROOT %back = bf16[28,100]{1,0} bitcast(%into)
}

ENTRY %main (a: f32[10]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  %s = bf16[28,100]{1,0} bitcast(%other)
  %one = s32[]{:S(6)} bitcast(%other)
  %nested = bf16[28,100]{1,0} fusion(%s, %one), kind=kLoop, calls=%outside
  %w = (s32[], f32[4]) while(%a), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %fetch = (f32[10]{0:S(1)}, f32[10]{0}, u32[]) copy-start(%a)
  ROOT %b = f32[10]{0} add(%a, %a)
}
"""


def test_slices_of_stacks_count_as_slices() -> None:
  # Three trips: 200 read + 200 written; 200 read into VMEM; 200 read and
  # written in place; the condition compares 4 with 4 bytes into 1. Then 40 are
  # fetched, and the sum takes 3 x 40. The nested fusion reads 200 and writes
  # 200.
  want = 3 * (400 + 200 + 400 + 9) + 40 + 120 + 400
  assert traffic.hbm_bytes(hlo.parse(_MOVED)) == want
