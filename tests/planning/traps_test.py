"""Warnings about gathers and reductions in loops."""

from ma_rlhf_jax.planning import hlo, loops, traffic, traps
from ma_rlhf_jax.planning.compiling import Compiled

_WEIGHTS = ((16, 256, 3072), (3072, 24576), (256000, 3072))
_LAYERS = loops.Loop('layers', 28, False)
_CHUNKS = loops.Loop('chunks', 32, False)
_PASSES = loops.Loop('passes', 4, False)
_DECODE = loops.Loop('decode', 511, True)


def _sent(
    kind: str, dims: tuple[int, ...], *loops: loops.Loop
) -> traffic.Collective:
  array = hlo.Array('bf16', dims, 0)
  return traffic.Collective(kind, (array,), 8, 2e9, loops, '')


def _warnings(*sent: traffic.Collective, tensor: int = 1) -> list[str]:
  program = Compiled(
      None,
      0,
      0,
      0,
      0,
      wire=sum(c.total for c in sent),
      collectives=sent,
      weights=_WEIGHTS,
  )
  return traps.warnings(program, tensor=tensor, passes=4, vocab=256000)


def test_weights_gathered_for_every_token() -> None:
  (line,) = _warnings(_sent('all-gather', (1, 3072, 24576), _DECODE, _LAYERS))
  assert 'every token of the decode loop' in line
  # Split over tensor, and with heads merged.
  found = _warnings(
      _sent('all-gather', (1, 3072, 12288), _DECODE, _LAYERS), tensor=2
  )
  assert found and 'every token' in found[0]
  found = _warnings(_sent('all-gather', (4096, 3072), _DECODE, _LAYERS))
  assert found and 'every token' in found[0]


def test_the_table_gathered_for_every_chunk() -> None:
  table = (256000, 3072)
  (line,) = _warnings(_sent('all-gather', table, _CHUNKS))
  assert 'loop over chunks' in line
  (line,) = _warnings(_sent('all-gather', table, _PASSES, _CHUNKS))
  assert 'loop over chunks' in line
  # Once for each micro-batch is what it takes.
  assert _warnings(_sent('all-gather', table, _PASSES)) == []
  assert _warnings(_sent('all-gather', table)) == []


def test_gradients_of_weights_reduced_whole() -> None:
  (line,) = _warnings(_sent('all-reduce', (3072, 24576), _LAYERS))
  assert 'a reduce-scatter sends half as much' in line
  assert _warnings(_sent('reduce-scatter', (3072, 384), _LAYERS)) == []
  assert _warnings(_sent('all-reduce', (3072, 24576))) == []


def test_activations_are_no_weights() -> None:
  assert _warnings(_sent('all-reduce', (4, 1024, 3072), _LAYERS)) == []
  (line,) = _warnings(_sent('all-reduce', (4, 1024, 3072), _DECODE, _LAYERS))
  assert line.startswith('the decode loop sends')


def test_what_is_small_beside_the_rest_is_not_told() -> None:
  rest = _sent('all-gather', (7, 7), *[_LAYERS] * 3)
  assert _warnings(_sent('all-reduce', (3072, 24576), _LAYERS), rest) == []
