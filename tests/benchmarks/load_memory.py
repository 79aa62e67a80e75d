"""How much memory the loading of a checkpoint takes beyond its arrays.

  python -m tests.benchmarks.load_memory --folder=/big/disk/x \
      [--preset=gemma-7b] [--layers=0] [--devices=1,8] [--keep]

Writes a checkpoint of random bfloat16 weights with the shape of a preset into
a new folder (17 GB for gemma-7b, in files of 5 GB as on the hub), loads it with
our loader in a process of its own for each number of CPU devices (over which
the parameters are split as by mesh.fsdp), and removes it; a folder that is
there already is loaded and stays. While a process lives its anonymous memory
(RssAnon) is sampled from outside. Memory for the arrays must be free.

The bound: the peak, everything that Python and JAX hold included, is at most
the bytes of the arrays, those of the largest tensor and 1 GiB. The exit status
is 1 where it does not hold. --layers=2 tries the tool itself in seconds.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import json
import math
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax.models import huggingface
from ma_rlhf_jax.models.presets import PRESETS, GemmaConfig
from ma_rlhf_jax.models.tensor_names import (
    CAPS,
    FULL,
    INDEX,
    SIZES,
    SLIDING,
    Tensor,
    list_tensors,
    to_ours,
)
from ma_rlhf_jax.parallel.mesh import make_mesh

_SHARD_BYTES = 5 * 10**9
_PIECE = 2**25  # numbers that are drawn and written at once
_SAMPLE_SECONDS = 0.003


def _shape(preset: str, layers: int) -> GemmaConfig:
  shape = PRESETS[preset]
  layers = layers or shape.num_layers
  return dataclasses.replace(
      shape,
      num_layers=layers,
      sliding_layers=shape.sliding_layers[:layers],
      dtype='bfloat16',
      param_dtype='bfloat16',
  )


def _bytes(tensor: Tensor) -> int:
  return 2 * math.prod(tensor.shape)


def _shards(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
  shard: list[Tensor] = []
  for tensor in tensors:
    if sum(map(_bytes, [*shard, tensor])) > _SHARD_BYTES and shard:
      yield shard
      shard = []
    shard.append(tensor)
  yield shard


def _write_shard(path: pathlib.Path, shard: list[Tensor], seed: int) -> None:
  """One file, a few MB at a time: +- 2**-7 to 2**-3, no two layers alike."""
  random, header, end = np.random.default_rng(seed), {}, 0
  for tensor in shard:
    begin, end = end, end + _bytes(tensor)
    header[tensor.name] = {
        'dtype': 'BF16',
        'shape': tensor.shape,
        'data_offsets': (begin, end),
    }
  text = json.dumps(header).encode()
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for left in range(end // 2, 0, -_PIECE):
      bits = random.integers(2**16, size=min(left, _PIECE), dtype=np.uint16)
      file.write((bits & 0x81FF | 0x3C00).tobytes())


def _write(folder: pathlib.Path, config: GemmaConfig) -> None:
  folder.mkdir(parents=True)
  fields = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
  fields |= {'model_type': config.family, 'torch_dtype': 'bfloat16'}
  if config.family == 'gemma2':
    fields |= {theirs: getattr(config, ours) for theirs, ours in CAPS.items()}
    slides = config.sliding_layers
    fields |= {
        'query_pre_attn_scalar': config.query_pre_attn_scalar,
        'sliding_window': config.sliding_window,
        'layer_types': [SLIDING if s else FULL for s in slides],
    }
  (folder / 'config.json').write_text(json.dumps(fields))
  shards, weight_map = list(_shards(list_tensors('policy', config))), {}
  for number, shard in enumerate(shards, 1):
    name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    weight_map |= {tensor.name: name for tensor in shard}
    _write_shard(folder / name, shard, seed=number)
  (folder / INDEX).write_text(json.dumps({'weight_map': weight_map}))


def _load(folder: pathlib.Path) -> None:
  """What the child does: loads, prints the figures, compares some layers."""
  config = dataclasses.replace(
      huggingface.read_shape(folder), param_dtype='bfloat16'
  )
  axes = {'data': 1, 'fsdp': -1, 'tensor': 1}
  start = time.perf_counter()
  with jax.set_mesh(make_mesh(ConfigDict(axes))):
    params = huggingface.load_params(folder, config)
  jax.block_until_ready(params)
  seconds = time.perf_counter() - start
  leaves = jax.tree.leaves(params)
  shards = [s for x in leaves for s in x.addressable_shards]
  pointers = {s.data.unsafe_buffer_pointer(): s.data.nbytes for s in shards}
  print(
      json.dumps(
          {
              'seconds': seconds,
              'array_bytes': sum(
                  pointers.values()
              ),  # what is shared counts once
              'num_params': sum(x.size for x in leaves),
          }
      ),
      flush=True,
  )
  sys.stdin.readline()  # the parent has seen the peak
  _compare(folder, config, params)


def _compare(folder: pathlib.Path, config: GemmaConfig, params: Any) -> None:
  """The last tensor of every parameter must be that of its file."""
  index = json.loads((folder / INDEX).read_text())['weight_map']
  last = {t.path: t for t in list_tensors('policy', config)}
  for path, tensor in last.items():
    ours = params
    for part in path.split('/'):
      ours = ours[part]
    path = folder / index[tensor.name]
    with path.open('rb') as file:
      (size,) = struct.unpack('<Q', file.read(8))
      begin, _ = json.loads(file.read(size))[tensor.name]['data_offsets']
    theirs = np.memmap(path, np.uint16, 'r', 8 + size + begin, tensor.shape)
    for shard in ours.addressable_shards:
      found = np.asarray(shard.data).view(np.uint16)
      where = shard.index
      if tensor.layer is not None:
        found, where = found[tensor.layer], where[1:]
      shape = ours.shape[ours.ndim - len(where) :]
      want = to_ours(theirs, tensor.inputs, shape)[where]
      for start in range(0, len(want), 256):  # comparing makes copies
        rows = slice(start, start + 256)
        np.testing.assert_array_equal(found[rows], want[rows])


def _anonymous_bytes(pid: int) -> int:
  with open(f'/proc/{pid}/status') as file:
    for line in file:
      if line.startswith('RssAnon'):
        return int(line.split()[1]) * 1024
  return 0  # it has just ended


def _measure(folder: pathlib.Path, devices: int) -> dict[str, Any]:
  """Figures of one load over this number of CPU devices."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  child = subprocess.Popen(
      [sys.executable, '-m', __spec__.name, f'--load={folder}'],
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
  )
  os.set_blocking(child.stdout.fileno(), False)
  peak, line = 0, ''
  while not line and child.poll() is None:
    peak = max(peak, _anonymous_bytes(child.pid))
    line = child.stdout.readline()
    time.sleep(_SAMPLE_SECONDS)
  child.communicate('\n')
  if child.returncode:
    raise SystemExit(f'loading on {devices} devices failed')
  return json.loads(line) | {'devices': devices, 'peak_bytes': peak}


def _report(found: dict[str, Any], largest: int) -> bool:
  """Prints the figures; returns whether the bound holds."""
  excess = found['peak_bytes'] - found['array_bytes']
  bound = largest + 2**30
  mib = lambda size: f'{size / 2**20:,.0f} MiB'
  print(
      f'{found["devices"]} device(s): {found["num_params"]:,} parameters in '
      f'{found["seconds"]:.1f} s; arrays {mib(found["array_bytes"])}, '
      f'peak of anonymous memory {mib(found["peak_bytes"])}, '
      f'excess {mib(excess)}; bound {mib(bound)} (largest tensor '
      f'{mib(largest)} + 1 GiB): {"holds" if excess <= bound else "BROKEN"}',
      flush=True,
  )
  return excess <= bound


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--folder', type=pathlib.Path)
  parser.add_argument('--preset', default='gemma-7b', choices=list(PRESETS))
  parser.add_argument('--layers', type=int, default=0, help='0: all')
  parser.add_argument('--devices', default='1,8')
  parser.add_argument('--keep', action='store_true', help='the checkpoint')
  parser.add_argument('--load', type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.load:
    _load(args.load)
    return
  config = _shape(args.preset, args.layers)
  largest = max(map(_bytes, list_tensors('policy', config)))
  keep = args.keep or args.folder.exists()
  if not args.folder.exists():
    start = time.perf_counter()
    _write(args.folder, config)
    size = sum(p.stat().st_size for p in args.folder.iterdir())
    print(f'wrote {size:,} bytes in {time.perf_counter() - start:.1f} s')
  try:
    devices = [int(n) for n in args.devices.split(',')]
    holds = [_report(_measure(args.folder, n), largest) for n in devices]
  finally:
    if not keep:
      shutil.rmtree(args.folder)
  sys.exit(not all(holds))


if __name__ == '__main__':
  main()
