"""The product of a stage as a folder for others, checked by reading it back.

Models are read one after the other, never two at once: a machine that holds
the model can publish it.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import TYPE_CHECKING, Any

from etils import epath
import jax
from jax.sharding import AxisType
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax import manifest
from ma_rlhf_jax.models import (
    export_check,
    exporting,
    heads,
    huggingface,
    peft_folder,
)
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.parallel.mesh import AXES
from ma_rlhf_jax.publishing import card, lineage
from ma_rlhf_jax.publishing.check_rows import Rows
from ma_rlhf_jax.structs import Params
from ma_rlhf_jax.training import products

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

DTYPES = ('float32', 'bfloat16')
RECEIPT = 'export_check.json'


@dataclasses.dataclass(frozen=True)
class Job:
  """One folder to write.

  Attributes:
    config: of the run.
    workdir: of the run.
    stage: 'sft', 'reward_model', 'ppo' or 'critic'; done.
    tokenizer: of the run.
    rows: token ids, BOS first, that the check runs on; see `check_rows`.
    model_path: what the card calls the model.
    draft: an empty local folder.
    base: hub id of what adapters go on top of; '' = as the run knows it.
  """

  config: ConfigDict
  workdir: epath.Path
  stage: str
  tokenizer: 'PreTrainedTokenizerBase'
  rows: Rows
  model_path: str
  draft: pathlib.Path
  base: str = ''

  @property
  def kind(self) -> str:
    return card.kind(self.stage)

  @functools.cached_property
  def product(self) -> pathlib.Path:
    """The folder that the stage left, on this machine."""
    return huggingface.resolve(products.product(self.workdir, self.stage))


def _load(
    folder: pathlib.Path, kind: str, dtype: str, kernel_dtype: str = ''
) -> tuple[GemmaConfig, Params]:
  """A model that computes in float32, its parameters in the given dtypes."""
  shape = dataclasses.replace(
      huggingface.read_shape(folder),
      param_dtype=dtype,
      # One shape for one program.
      kernel_dtype='' if kernel_dtype == dtype else kernel_dtype,
      remat='none',
  )
  return shape, huggingface.load_params(folder, shape, kind)


def _outputs(job: Job, folder: pathlib.Path, dtype: str) -> np.ndarray:
  return export_check.ours(job.kind, *_load(folder, job.kind, dtype), job.rows)


def _stored_dtype(folder: pathlib.Path) -> str:
  """That of the matrices, in a dtype that every reader knows."""
  found = json.loads((folder / exporting.CONFIG).read_text())['dtype']
  return found if found in DTYPES else 'float32'


def _mesh(job: Job, shape: GemmaConfig) -> contextlib.AbstractContextManager:
  """All devices, where they can share the weights and the rows; else one."""
  types = (AxisType.Auto,) * len(AXES)
  devices = jax.local_devices()
  mesh = lambda n: jax.make_mesh(
      (1, n, 1), AXES, devices=devices[:n], axis_types=types
  )
  if len(job.rows) % len(devices):
    return jax.set_mesh(mesh(1))
  with jax.set_mesh(mesh(len(devices))):
    uneven = partition.indivisible(heads.abstract_params(job.kind, shape))
  return jax.set_mesh(mesh(1 if uneven else len(devices)))


def write_model(
    job: Job, *, dtype: str, max_shard_bytes: int
) -> dict[str, Any]:
  """Writes the whole model, its card and its receipt; returns the receipt.

  Args:
    job: what and where.
    dtype: of the tensors, one of `DTYPES`; '' = that of the matrices.
    max_shard_bytes: cut into files of at most this size (or one tensor).

  Raises:
    ExportCheckError: if what is read back is not what was written.
  """
  stored = _stored_dtype(job.product)
  dtype = dtype or stored
  shape = huggingface.read_shape(job.product)
  # The norms of a model with adapters may be wider than its matrices.
  uniform = stored == 'float32' or not job.config.lora.rank
  with _mesh(job, shape):
    trained = _write_tensors(
        job,
        stored if uniform else 'float32',
        stored,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    want = trained
    if not uniform or dtype != stored:
      want = _outputs(job, job.product, dtype)
    got = _outputs(job, job.draft, dtype)
  ours = export_check.difference(job.kind, want, got, export_check.SAME_PROGRAM)
  readers = {'ma_rlhf_jax': ours}
  sums = {'ma_rlhf_jax': 'float32'}
  found = export_check.by_transformers(
      job.draft, job.kind, job.rows, num_params=shape.num_params
  )
  _add_reader('transformers', job.kind, want, found, readers, sums)
  rounding = export_check.difference(job.kind, trained, want, 1.0)
  receipt = _receipt(job, dtype, want, readers, sums) | {
      'rounding_to_dtype': {
          k: v for k, v in rounding.items() if not k.endswith('allowed')
      }
  }
  return _finish(job, shape, receipt)


def _write_tensors(
    job: Job, *stored: str, dtype: str, max_shard_bytes: int
) -> np.ndarray:
  """Writes the model in `dtype`; what it says in the dtypes it is stored in."""
  shape, params = _load(job.product, job.kind, *stored)
  exporting.save(
      job.draft,
      params,
      shape,
      job.kind,
      job.tokenizer,
      dtype=dtype,
      max_shard_bytes=max_shard_bytes,
  )
  return export_check.ours(job.kind, shape, params, job.rows)


def write_adapter(job: Job) -> dict[str, Any]:
  """Writes the adapters, their card and their receipt; returns the receipt.

  Raises:
    ExportCheckError: if base and adapters are not the merged model.
  """
  folder = epath.Path(products.adapter(job.workdir, job.stage))
  manifest.verify(folder)
  for name in (peft_folder.CONFIG, peft_folder.TENSORS):
    (folder / name).copy(job.draft / name)
  exporting.write_tokenizer(job.draft, job.tokenizer)
  name = peft_folder.read_base(job.draft)
  base = huggingface.resolve(name)
  shape = huggingface.read_shape(base)
  merged = _stored_dtype(job.product)
  with _mesh(job, shape):
    want = export_check.ours(
        job.kind, *_load(job.product, job.kind, 'float32', merged), job.rows
    )
    got = export_check.ours(job.kind, *_with_adapter(job, base), job.rows)
  share = export_check.ROUNDING[merged]
  readers = {'ma_rlhf_jax': export_check.difference(job.kind, want, got, share)}
  sums = {'ma_rlhf_jax': 'float32'}
  found = export_check.by_transformers(
      base, job.kind, job.rows, num_params=shape.num_params, adapter=job.draft
  )
  _add_reader('peft', job.kind, want, found, readers, sums, share)
  receipt = _receipt(job, 'float32', want, readers, sums)
  # No folder name of this machine is published.
  public = job.base or lineage.public_name(name) or lineage.NO_NAME
  peft_folder.rename_base(job.draft, public)
  exporting.write_manifest(job.draft)
  return _finish(job, shape, receipt, base=public)


def _with_adapter(job: Job, base: pathlib.Path) -> tuple[GemmaConfig, Params]:
  """The base as it was while the adapters learned, with the adapters."""
  # Reward models start from a policy and bring a head; critics have one.
  kind = 'scalar' if job.stage == 'critic' else 'policy'
  trained = job.config.model.dtype
  kernels = trained if trained in DTYPES else 'float32'
  shape, params = _load(base, kind, 'float32', kernels)
  if job.kind != kind:
    params = {'backbone': params}
  return peft_folder.load(job.draft, shape, job.kind, params)


def _add_reader(
    name: str,
    kind: str,
    want: np.ndarray,
    found: tuple[np.ndarray, str] | None,
    readers: dict[str, Any],
    sums: dict[str, str | None],
    least_share: float = 0.0,
) -> None:
  """Adds what another library reads; None where it is not installed."""
  readers[name], sums[name] = None, None
  if found is not None:
    got, sums[name] = found
    share = max(least_share, export_check.ROUNDING[sums[name]])
    readers[name] = export_check.difference(kind, want, got, share)


def _receipt(
    job: Job,
    dtype: str,
    want: np.ndarray,
    readers: dict[str, Any],
    sums: dict[str, str | None],
) -> dict[str, Any]:
  for name, found in readers.items():
    if found is not None:
      export_check.require_small(name, job.kind, found)
  return {
      'stage': job.stage,
      'kind': job.kind,
      'product_sha256': manifest.digest_of(job.product),
      'dtype': dtype,
      'rows': len(job.rows),
      'tokens': sum(map(len, job.rows)),
      'compared': len(want),
      'readers': readers,
      'sums_in': sums,
      'reader_versions': {
          name: None if found is None else export_check.versions_of(name)
          for name, found in readers.items()
      },
  }


def _finish(
    job: Job, shape: GemmaConfig, receipt: dict[str, Any], base: str = ''
) -> dict[str, Any]:
  """Writes the card, the notice that Gemma's terms ask for, and the receipt."""
  subject = card.Subject(
      job.config,
      job.workdir,
      job.stage,
      shape,
      job.model_path,
      base=base,
      receipt=receipt,
  )
  (job.draft / 'README.md').write_text(card.text(subject))
  if lineage.is_gemma(lineage.base_model(job.config, job.stage), shape):
    (job.draft / 'NOTICE').write_text(card.GEMMA_NOTICE + '\n')
  receipt = receipt | {
      'versions': export_check.versions(),
      'sha256': export_check.sha256_of_files(job.draft),
  }
  content = json.dumps(receipt, indent=2, allow_nan=False)
  (job.draft / RECEIPT).write_text(content + '\n')
  return receipt
