"""Memory of a program, read from text as XLA dumps it."""

from ma_rlhf_jax.planning import buffers

_TEXT = """BufferAssignment:
allocation 0: size 4000, page 0, parameter 0, shape |f32[10,100]| at ShapeI:
 value: <1 p0 @0> (size=4000,offset=0): f32[10,100]{1,0:T(8,128)}
allocation 1: size 300, page 0, parameter 1, maybe-live-out, shape |f32[75]|:
 value: <2 p1 @0> (size=300,offset=0): f32[75]{0}
allocation 2: size 20, page 0, output shape is |(f32[])|, maybe-live-out:
allocation 3: size 5, page 0, constant:
allocation 4: size 900, page 0, preallocated-temp:
 value: <3 while.1{2} (phi) @1> (size=400,offset=0): bf16[2,100]{1,0:T(8,128)}
 value: <4 fusion.1{0} @1> (size=390,offset=4): f32[97]{0}
 value: <5 add @1> (size=100,offset=400): f32[25]{0}
 value: <6 dot.2 @1> (size=300,offset=500): f32[75]{0}
allocation 5: size 7000, color 1, page 0, preallocated-temp:
 value: <7 vmem @1> (size=7000,offset=0): f32[1750]{0:S(1)}
allocation 6: size 60000, page 0, thread-local:
 value: <8 inside @1> (size=60000,offset=0): f32[15000]{0}

Total bytes used: 72225
"""


def test_only_hbm_counts_and_fusions_do_not() -> None:
  memory = buffers.parse(_TEXT)
  assert memory.args == 4000 + 300  # the second is an output as well
  assert memory.temp == 900 + 5
  assert memory.out == 20
  assert memory.need == 5225


def test_the_largest_values_have_places_of_their_own() -> None:
  first, second = buffers.parse(_TEXT, count=2).largest
  assert first == buffers.Buffer(400, 'bf16[2,100]', 'while.1')
  # fusion.1 lies where while.1 does.
  assert second == buffers.Buffer(300, 'f32[75]', 'dot.2')
