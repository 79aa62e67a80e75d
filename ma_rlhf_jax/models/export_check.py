"""Whether a folder that was written says what its source says.

The same rows of tokens go through the source and through what is read back
from the files: by our loader, and by `transformers` (and `peft`) where PyTorch
is installed. Sums are made in float32.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
from typing import TYPE_CHECKING
import warnings

import jax
import numpy as np

from ma_rlhf_jax import masking
from ma_rlhf_jax.models import gemma, heads, vocabulary
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.mesh import matmul_precision
from ma_rlhf_jax.structs import Array, Params

if TYPE_CHECKING:
  import torch
  from transformers import PreTrainedModel

# Logits are compared at the last tokens of each row: eight rows of a vocabulary
# of 256,000 are then half a gigabyte.
LAST_TOKENS = 64
# Largest difference that is rounding, as a share of the root mean square of
# what is compared: between equal programs, and between different ones that sum
# in these dtypes. A wrong tensor gives about 1.
SAME_PROGRAM = 1e-5
ROUNDING = {'float32': 2e-3, 'bfloat16': 0.3}
# Of a model of at most so many bytes in float32, transformers makes its sums in
# float32, whatever the files hold; larger ones stay as they are.
_FLOAT32_BYTES = 16 * 2**30
_PACKAGES = ('ma_rlhf_jax', 'jax', 'transformers', 'torch', 'peft')
# Reader of a receipt -> the packages that read the files for it.
_RUN_BY = {
    'ma_rlhf_jax': ('ma_rlhf_jax', 'jax'),
    'transformers': ('transformers', 'torch'),
    'peft': ('peft', 'transformers', 'torch'),
}
_UNITS = {'policy': 'logit', 'scalar': 'score'}


class ExportCheckError(ValueError):
  """What was written differs from its source."""


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """int32 tokens and bool mask, padded on the left to a multiple of 8."""
  width = -(-max(map(len, rows)) // 8) * 8
  tokens = np.zeros((len(rows), width), np.int32)
  mask = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    tokens[i, width - len(row) :] = row
    mask[i, width - len(row) :] = True
  return tokens, mask


@functools.partial(jax.jit, static_argnames=('kind', 'config'))
def _forward(
    kind: str,
    config: GemmaConfig,
    params: Params,
    tokens_BL: Array,
    mask_BL: Array,
) -> Array:
  if kind == 'scalar':
    scores_BL = heads.token_scores(config, params, tokens_BL, mask_BL)
    return masking.end_scores(scores_BL, mask_BL)
  hidden_BLD = gemma.hidden_states(config, params, tokens_BL, mask_BL)
  return vocabulary.head_logits(
      hidden_BLD[:, -LAST_TOKENS:],
      params['embedding'],
      softcap=config.final_softcap,
  )


def ours(
    kind: str,
    config: GemmaConfig,
    params: Params,
    rows: Sequence[Sequence[int]],
) -> np.ndarray:
  """What our model says about rows of tokens.

  Args:
    kind: 'policy' or 'scalar'.
    config: its shape; `dtype` is that of the sums.
    params: its parameters, on any shardings.
    rows: token ids, BOS first; none is empty.

  Returns:
    A policy's logits [tokens, V] at the last `LAST_TOKENS` tokens of every row,
    or a scalar model's scores [rows].
  """
  tokens_BL, mask_BL = _padded(rows)
  # Else products would have 8 or 10 bits on a TPU or GPU, and not agree with
  # those of transformers.
  with matmul_precision('highest'):
    out = np.asarray(_forward(kind, config, params, tokens_BL, mask_BL))
  return out if kind == 'scalar' else out[mask_BL[:, -LAST_TOKENS:]]


def by_transformers(
    folder: str | os.PathLike[str],
    kind: str,
    rows: Sequence[Sequence[int]],
    *,
    num_params: int,
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[np.ndarray, str] | None:
  """What `ours` gives, by `transformers`, and the dtype of its sums.

  Args:
    folder: of the model, or of the base of an adapter.
    kind: 'policy' or 'scalar'.
    rows: as in `ours`.
    num_params: of the model; decides the dtype.
    adapter: a folder of `peft` to put on top.

  Returns:
    None where a package that is needed is not installed.

  Raises:
    ExportCheckError: if tensors are missing or left over.
  """
  needed = ['torch'] if adapter is None else ['torch', 'peft']
  if not all(map(importlib.util.find_spec, needed)):
    return None
  import torch

  exact = 4 * num_params <= _FLOAT32_BYTES
  with _quiet():
    model = _load(folder, kind, torch.float32 if exact else 'auto', adapter)
  dtype = str(model.dtype).removeprefix('torch.')
  with torch.no_grad():
    logits = [model(torch.tensor([list(row)])).logits[0] for row in rows]
  if kind == 'scalar':
    return np.asarray([float(x[0]) for x in logits], np.float32), dtype
  cut = [x[-LAST_TOKENS:].float().numpy() for x in logits]
  return np.concatenate(cut), dtype


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """What transformers has to say while it loads is of no use here."""
  from transformers.utils import logging

  before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
  logging.set_verbosity_error()
  logging.disable_progress_bar()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.set_verbosity(before)
    if bars:
      logging.enable_progress_bar()


def _load(
    folder: str | os.PathLike[str],
    kind: str,
    dtype: 'torch.dtype | str',
    adapter: str | os.PathLike[str] | None,
) -> 'PreTrainedModel':
  from huggingface_hub.errors import StrictDataclassError
  import transformers

  auto = transformers.AutoModelForCausalLM
  if kind == 'scalar':
    auto = transformers.AutoModelForSequenceClassification
  # The base of an adapter may be a policy, whose folder says nothing of labels.
  more = {'num_labels': 1} if kind == 'scalar' and adapter else {}
  try:
    model, report = auto.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation='eager',  # the one that bounds scores
        output_loading_info=True,
        **more,
    )
  except (ValueError, RuntimeError, StrictDataclassError) as error:
    words = ' '.join(str(error).split())
    raise ExportCheckError(
        f'transformers cannot read {folder}: {words}'
    ) from error
  if adapter is not None:
    import peft

    return peft.PeftModel.from_pretrained(model, adapter).eval()
  if wrong := {what: sorted(names) for what, names in report.items() if names}:
    raise ExportCheckError(f'transformers finds in {folder}: {wrong}')
  return model.eval()


def difference(
    kind: str, want: np.ndarray, got: np.ndarray, share: float
) -> dict[str, float]:
  """How far `got` is from `want`.

  Args:
    kind: 'policy' or 'scalar'.
    want: of the source, as `ours` gives it.
    got: of what was written.
    share: what may be rounding, of the root mean square of `want`.

  Returns:
    For a receipt: the largest difference and the largest allowed, in logits or
    reward-model units; for a policy also the share of tokens for which the most
    probable next token is the same.
  """
  unit = _UNITS[kind]
  scale = float(np.sqrt(np.mean(np.square(want, dtype=np.float64))))
  found = {
      f'max_{unit}_difference': float(np.max(np.abs(got - want))),
      f'max_{unit}_difference_allowed': share * scale,
  }
  if kind == 'policy':
    same = want.argmax(-1) == got.argmax(-1)
    found['top1_agreement'] = float(np.mean(same))
  return found


def require_small(reader: str, kind: str, found: dict[str, float]) -> None:
  """Raises ExportCheckError where a difference is more than rounding.

  Args:
    reader: who read the files, for the message.
    kind: 'policy' or 'scalar'.
    found: of `difference`.
  """
  unit = _UNITS[kind]
  largest = found[f'max_{unit}_difference']
  allowed = found[f'max_{unit}_difference_allowed']
  if not largest <= allowed:  # also where it is nan
    raise ExportCheckError(
        f'what {reader} reads back differs from its source by up to '
        f'{largest:.3g} per {unit}, more than the {allowed:.3g} that may be '
        'rounding; nothing was exported. Check disk and memory; where they are '
        'sound, this is an error of ours'
    )


def sha256_of_files(folder: str | os.PathLike[str]) -> dict[str, str]:
  """Name -> SHA-256 (hex) of every file of a folder, by name."""
  files = sorted(p for p in pathlib.Path(folder).iterdir() if p.is_file())
  hashes = {}
  for path in files:
    with path.open('rb') as file:
      hashes[path.name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return hashes


def versions_of(reader: str) -> dict[str, str | None]:
  """Versions of the packages that a reader of a receipt runs with."""
  return {name: versions()[name] for name in _RUN_BY[reader]}


def versions() -> dict[str, str | None]:
  """Versions of the packages that took part; None where one is absent."""
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found
