"""What the compiled programs of a run hold, move and reuse, on a mesh of 8."""

from collections.abc import Iterator
import functools
import math
import re

import jax
import pytest

from ma_rlhf_jax.models import presets
from ma_rlhf_jax.planning import abstract
from ma_rlhf_jax.training import update
from ma_rlhf_jax.training.spec import Program
from tests import tiny

# 16 rows of 32 response tokens on 4 x 2 devices; two micro-batches of 8.
ROWS, RESPONSE, VOCAB, CHUNK, MICRO = 16, 32, 4096, 8, 8
SIZES = (2, 2, 2)
# One device's rows, and its part of the vocabulary where `tensor` splits it.
_TOKENS, _VOCAB = MICRO // 4 * RESPONSE, VOCAB // 2
WIDTH = tiny.SHAPE.embed_dim

_UPDATES = ('ppo/update_policy', 'ppo/update_critic')
_HEADS = ('ppo/score', 'ppo/update_policy')


Programs = dict[str, tuple[Program, jax.stages.Compiled]]


@pytest.fixture(scope='module')
def programs() -> Programs:
  """The compiled updates and the scoring of a tiny run."""
  fields = {
      f'model__{name}': getattr(tiny.SHAPE, name)
      for name in presets.SHAPE_FIELDS
      if name != 'sliding_layers'
  }
  fields |= {'model__vocab_size': VOCAB, 'model__num_heads': 4}
  fields |= {'model__logprob_chunk': CHUNK, 'ppo__batch_size': ROWS}
  fields |= {'ppo__micro_batch_size': MICRO, 'stages': ('ppo',)}
  config = tiny.config(ppo__one_pass='off', **fields)
  mesh = tiny.mesh(*SIZES)
  spec = tiny.spec(config, mesh=mesh, response_len=RESPONSE)
  with jax.set_mesh(mesh):
    (stage,) = abstract.programs_of(spec, VOCAB, {'ppo': 8}).values()
    found = stage.programs.listing()
    wanted = sorted({*_UPDATES, *_HEADS})
    compile_one = lambda p: p.function.lower(*p.args).compile()
    return {name: (found[name], compile_one(found[name])) for name in wanted}


def _shapes(text: str) -> Iterator[tuple[int, ...]]:
  """Of every array that a piece of HLO names."""
  for dims in re.findall(r'\w\[([\d,]+)\]', text):
    yield tuple(map(int, dims.split(',')))


def _computations(text: str) -> dict[str, list[str]]:
  """Lines of each computation by its name."""
  found, name = {}, ''
  for line in text.splitlines():
    opened = re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line)
    if opened:
      name = opened[1]
    found.setdefault(name, []).append(line)
  return found


def _moved(lines: list[str], operations: str) -> list[str]:
  return [x for x in lines if re.search(rf' ({operations})(-start)?\(', x)]


@pytest.mark.parametrize('name', _HEADS)
def test_logits_of_all_tokens_never_exist(name: str, programs: Programs):
  text = programs[name][1].as_text()
  # A device holds CHUNK tokens' logits: parts of the vocabulary, of all tokens
  # of the devices that share a chunk.
  largest = max(map(math.prod, _shapes(text)))
  assert CHUNK * VOCAB <= largest < _TOKENS * _VOCAB / 2


def _gathers_of_rows(text: str) -> list[str]:
  """Gathers of more rows of the table than a device keeps."""
  gathers = _moved(text.splitlines(), 'all-gather')
  return [x for x in gathers for s in _shapes(x) if max(s) >= VOCAB // 4]


@pytest.mark.parametrize('name', sorted({*_UPDATES, *_HEADS}))
def test_no_device_gathers_the_table(name: str, programs: Programs):
  text = programs[name][1].as_text()
  assert _moved(text.splitlines(), 'all-gather')  # of layers, by fsdp
  assert _gathers_of_rows(text) == []


@pytest.mark.parametrize('axes', [(), ('tensor',)])
def test_a_gather_of_the_table_would_be_found(
    axes: tuple[str, ...], programs: Programs
):
  """Of all its rows, and of the part that `tensor` leaves to a device."""
  state = programs['ppo/update_policy'][0].args[0]
  table, mesh = state.params['embedding'], tiny.mesh(*SIZES)
  want = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes))
  gather = jax.jit(lambda x: x * 2, out_shardings=want)
  assert _gathers_of_rows(gather.lower(table).compile().as_text())


def test_the_gradient_of_the_table_is_summed_after_the_loop(
    programs: Programs,
):
  text = programs['ppo/update_policy'][1].as_text()
  # Rows are split over `tensor` and `fsdp`, so that only `data` sums them; a
  # micro-batch is one turn of an outer loop, a chunk of an inner one.
  sums = _moved(text.splitlines(), 'all-reduce|reduce-scatter')
  part = VOCAB // 4 * WIDTH
  assert [x for x in sums if any(math.prod(s) == part for s in _shapes(x))]
  computations = _computations(text)
  heads = [
      '\n'.join(lines)
      for lines in computations.values()
      if any(f'{VOCAB // 4}]' in x and ' dot(' in x for x in lines)
  ]
  assert heads  # where chunks are multiplied with their part of the table
  for lines in heads:
    moved = _moved(lines.splitlines(), 'all-reduce|reduce-scatter|all-to-all')
    for line in moved:
      assert max(map(math.prod, _shapes(line))) < part


@pytest.mark.parametrize('name', _UPDATES)
def test_the_state_is_updated_in_place(name: str, programs: Programs):
  program, compiled = programs[name]
  state = jax.tree.leaves(program.args[0])
  size = lambda x: math.prod(x.sharding.shard_shape(x.shape))
  held = sum(size(x) * x.dtype.itemsize for x in state)
  assert compiled.memory_analysis().alias_size_in_bytes >= 0.95 * held


@pytest.mark.parametrize('num_micro', [1, 2])
def test_gradients_leave_the_step_as_their_parameters_lie(
    num_micro: int, programs: Programs
):
  state = programs['ppo/update_policy'][0].args[0]

  def loss(params, rows):
    # Of all of them the same, so that nothing but the step splits them.
    total = sum(jax.numpy.sum(x) for x in jax.tree.leaves(params))
    return total * jax.numpy.sum(rows), {}

  with jax.set_mesh(tiny.mesh(*SIZES)):
    step = functools.partial(
        update.accumulate_gradients, loss, num_micro=num_micro
    )
    rows = jax.ShapeDtypeStruct((ROWS,), 'float32')
    compiled = jax.jit(step).lower(state.params, rows).compile()
  grads, _ = compiled.output_shardings
  same = jax.tree.map(
      lambda like, s: s.is_equivalent_to(like.sharding, like.ndim),
      state.params,
      grads,
  )
  assert all(jax.tree.leaves(same))
