"""One compile in a process of its own: `python -m ...planning.child JOB`.

It alone loads libtpu, whose messages and crashes stay out of the caller. The
JSON file JOB says what to do; answers are files too, since libtpu writes to
standard output and error, and the caller may end this process when it has what
it wants.
"""

import ctypes
import json
import os
import pathlib
import re
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp

from ma_rlhf_jax import atomic_file
from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.models import presets
from ma_rlhf_jax.parallel.mesh import matmul_precision
from ma_rlhf_jax.planning import abstract, flops, residency
from ma_rlhf_jax.planning import topology as topology_lib

# "... exceeds available HBM (15.75G)", "total memory required ... (21.13G)"
_AVAILABLE = re.compile(r'available HBM \(([\d.]+)([KMG])\)')
_REQUIRED = re.compile(r'temporaries \(([\d.]+)([KMGT])\)')
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


_PR_SET_PDEATHSIG = 1  # of prctl(2)


def _end_with_caller(caller: int) -> None:
  """Nobody waits for minutes of compiling when the caller was killed."""
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != caller:  # it was killed while this process began
    sys.exit(f'process {caller}, which wanted this compile, has ended')


def bytes_in(pattern: re.Pattern, message: str) -> int | None:
  """The bytes that a message of the compiler tells."""
  found = pattern.search(message)
  return found and int(float(found.group(1)) * _UNITS[found.group(2)])


def devices_of(name: str) -> list[Any]:
  """The devices of a topology: compile-only ones of a TPU, or CPUs."""
  topology = topology_lib.parse(name)
  if topology.platform == 'gpu':
    return jax.devices('cpu')[: topology.num_devices]
  from jax.experimental import topologies

  options = {}
  if topology.kind == 'v4':
    options['chip_config_name'] = 'megacore'  # as JAX shows a v4 VM
  return list(
      topologies.get_topology_desc(
          platform='tpu', topology_name=name, **options
      ).devices
  )


def available_hbm(device: Any) -> int:
  """Bytes of HBM that the compiler grants a program, told by its refusal."""
  where = jax.sharding.SingleDeviceSharding(device)
  huge = jax.ShapeDtypeStruct((2**40,), jnp.int8, sharding=where)
  try:
    jax.jit(lambda x: x + 1).trace(huge).lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if found := bytes_in(_AVAILABLE, str(error)):
      return found
    raise
  raise RuntimeError('the compiler granted a terabyte; its HBM is unknown')


def _weights(args: Any, vocab: int) -> list[list[int]]:
  """Shapes of the matrices of a layer, and of the table, in arguments."""
  found = set()
  for path, x in jax.tree_util.tree_leaves_with_path(args):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    last = name.rpartition('/')[2]
    if last in config_lib.KERNELS and x.ndim > 2:
      found.add(x.shape[1:])
    elif last == 'embedding':
      found.add((vocab, x.shape[-1]))
  return [list(shape) for shape in sorted(found)]


def _facts(program: Any, found: Any, config: Any) -> tuple[Any, dict[str, Any]]:
  """The traced program, and what is known of it without compiling."""
  traced = abstract.traced(program)
  _, response_len = config_lib.lengths(config)
  resident, others = residency.beside(program.args, found)
  return traced, {
      'flops': flops.count(traced.jaxpr, default_trips=response_len),
      'resident_args': resident,
      'other_args': others,
  }


def _shape(config: Any) -> presets.GemmaConfig:
  return presets.from_config(config.model, config.tokenizer.vocab_size)


def _survey(job: dict[str, Any], config: Any, mesh: Any) -> dict[str, Any]:
  """What there is to compile, and what stays on a device."""
  answer: dict[str, Any] = {'stages': {}, 'num_params': 0}
  if job['ask_hbm']:
    answer['hbm'] = available_hbm(mesh.devices.flat[0])
  stages = abstract.stages(config, mesh, job['rows'])
  answer['num_params'] = _shape(config).num_params
  with jax.set_mesh(mesh), matmul_precision(config.model.matmul_precision):
    for name, stage in stages.items():
      found = residency.residents(stage.programs)
      programs = stage.programs.listing()
      answer['stages'][name] = {
          'steps': stage.num_steps,
          'resident': residency.sizes(found),
          'programs': {p: {} for p in programs},
      }
      if job['count']:
        for p, program in programs.items():
          _, facts = _facts(program, found, config)
          answer['stages'][name]['programs'][p] = facts
  return answer


def _compile(job: dict[str, Any], config: Any, mesh: Any) -> dict[str, Any]:
  """Compiles one program; writes what is known of it before that."""
  stage_name = job['program'].partition('/')[0]
  config = config_lib.restore(config_lib.flatten(config))
  config.stages = (stage_name,)
  stage = abstract.stages(config, mesh, job['rows'])[stage_name]
  with jax.set_mesh(mesh), matmul_precision(config.model.matmul_precision):
    program = stage.programs.listing()[job['program']]
    found = residency.residents(stage.programs)
    traced, facts = _facts(program, found, config)
    facts['weights'] = _weights(program.args, _shape(config).vocab_size)
    atomic_file.write_json(job['facts'], facts)
    options = {'xla_dump_to': job['dump'], 'xla_dump_hlo_as_text': True}
    try:
      compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return {'required': bytes_in(_REQUIRED, str(error))}
  found = compiled.memory_analysis()
  alias = found.alias_size_in_bytes
  return {
      'args': found.argument_size_in_bytes,
      'temp': found.temp_size_in_bytes,
      'out': found.output_size_in_bytes - alias,
  }


def main(path: str) -> None:
  """Does the job of that file."""
  job = json.loads(pathlib.Path(path).read_text())
  _end_with_caller(job['caller'])
  config = config_lib.restore(job['config'])
  do = _compile if job['program'] else _survey
  if topology_lib.parse(job['topology']).platform == 'gpu':
    # Traced on CPUs, which have no other kernel; the formulas know the GPU's.
    config.model.attention = 'xla'
  mesh = abstract.mesh_over(config, devices_of(job['topology']))
  atomic_file.write_json(job['answer'], do(job, config, mesh))


if __name__ == '__main__':
  main(sys.argv[1])
