"""Exports a trained model as a Hugging Face folder.

The folder holds a model card and a receipt as well. It appears only after it
has been read back and its outputs match the source model.

Exit codes: 0 done; 1 an error; 130 Ctrl-C; 143 SIGTERM. After an error no part
of the folder is left, except where only the upload failed.
"""

import dataclasses
import re
import shlex
import signal
import sys
from typing import TYPE_CHECKING

from ma_rlhf_jax import interrupts
from ma_rlhf_jax.commands import command, verbs

if __name__ == '__main__':  # before the imports below, which take seconds
  interrupts.end_on_ctrl_c()
  command.answer(verbs.EXPORT)

from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.commands import absl_flags
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import (
    exporting,
    folders,
    hub,
    huggingface,
    peft_folder,
)
from ma_rlhf_jax.objective.targets import BASELINES
from ma_rlhf_jax.publishing import card, check_rows, lineage, publish
from ma_rlhf_jax.training import checkpoint, products, sources, symptoms

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

STAGES = ('sft', 'reward_model', 'ppo', 'critic')
_UNITS = {'': 1, 'K': 10**3, 'M': 10**6, 'G': 10**9}


class ExportError(ValueError):
  """Nothing can be exported; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Request:
  """The values of the flags; `commands.verbs.EXPORT` says what each means."""

  workdir: str
  output: str
  stage: str = 'ppo'
  dtype: str = ''
  adapter: bool = False
  max_shard_size: str = '5GB'
  prompts: str = ''
  overwrite: bool = False
  push_to_hub: str = ''
  base: str = ''


def _check_rows(
    request: Request, config: ConfigDict, tokenizer: 'PreTrainedTokenizerBase'
) -> check_rows.Rows:
  kind = card.kind(request.stage)
  if request.prompts:
    return check_rows.of_file(request.prompts, tokenizer, kind)
  return check_rows.held_out(config, tokenizer, kind)


def _told(
    request: Request, workdir: epath.Path, config: ConfigDict, told: str
) -> str:
  """`told`, and what the user should know before the folder is used."""
  trainer = 'ppo' if request.stage == 'critic' else request.stage
  done = workdir_lib.read_done(workdir, trainer) or {}
  for line in symptoms.lines(done.get('symptoms', {})):
    told += f'\nwarning: symptom of a failed run: {line}'
  if request.adapter and not _public_base(workdir, config, request):
    told += (
        f'\nnote: the base is a local folder, called {lineage.NO_NAME} in the '
        'card; publish it too and name it by --base, or export merged, without '
        '--adapter'
    )
  return told


def export(request: Request) -> str:
  """Makes the folder, and uploads it where that is asked for.

  Returns:
    What to tell the user.

  Raises:
    ValueError, OSError: in words for the user; nothing of the folder is left,
      except where only the upload failed.
  """
  shard_bytes = _check(request)
  workdir, config = workdir_lib.read_config(request.workdir)
  _check_done(workdir, config, request)
  config = workdir_lib.as_trained(workdir, config)
  output = epath.Path(request.output).expanduser()
  marker = peft_folder.CONFIG if request.adapter else exporting.CONFIG
  with folders.whole(
      output, marker=marker, overwrite=request.overwrite
  ) as draft:
    product = huggingface.resolve(products.product(workdir, request.stage))
    tokenizer = tokenizer_lib.load_tokenizer(str(product))
    rows = _check_rows(request, config, tokenizer)
    job = publish.Job(
        config,
        workdir,
        request.stage,
        tokenizer,
        rows=rows,
        model_path=request.push_to_hub or output.name,
        draft=draft,
        base=request.base,
    )
    if request.adapter:
      receipt = publish.write_adapter(job)
    else:
      receipt = publish.write_model(
          job, dtype=request.dtype, max_shard_bytes=shard_bytes
      )
  told = _told(request, workdir, config, f'{output}: {_summary(receipt)}')
  if request.push_to_hub:
    told += f'\nuploaded to {hub.upload(output, request.push_to_hub)}'
  return told


def _check(request: Request) -> int:
  """Raises what can be known before any file is read; the bytes of a shard."""
  if request.stage not in STAGES:
    raise ExportError(
        f'--stage={request.stage}: choose one of {", ".join(STAGES)}'
    )
  if request.dtype not in ('', *publish.DTYPES):
    raise ExportError(
        f'--dtype={request.dtype}: choose one of {", ".join(publish.DTYPES)}, '
        'or leave it out to keep that of the model'
    )
  size = re.fullmatch(r'(\d+)([KMG]?)B', request.max_shard_size)
  if not size or not int(size[1]):
    raise ExportError(
        f'--max_shard_size={request.max_shard_size}: write for example 5GB or '
        '500MB'
    )
  if request.adapter and request.dtype:
    raise ExportError(
        f'--dtype={request.dtype}: adapters are always float32; leave it out'
    )
  if request.base and not request.adapter:
    raise ExportError(f'--base={request.base} needs --adapter')
  if request.base and not lineage.is_hub_id(request.base):
    raise ExportError(
        f'--base={request.base}: a model of the hub is named user/name'
    )
  _check_output(request)
  if request.push_to_hub:
    hub.check(request.push_to_hub)
  return int(size[1]) * _UNITS[size[2]]


def _check_output(request: Request) -> None:
  output = epath.Path(request.output).expanduser()
  if request.push_to_hub and '://' in request.output:
    raise ExportError(
        f'--output={request.output}: an upload starts from a local folder'
    )
  if not output.exists():
    return
  if not output.is_dir():
    raise ExportError(f'--output={output} is a file; give a new path')
  empty = not any(output.iterdir())
  if not empty and not request.overwrite:
    raise ExportError(
        f'--output={output} is there and not empty; give a new path, or '
        '--overwrite where it is an export'
    )
  if not empty and not (output / publish.RECEIPT).exists():
    raise ExportError(
        f'--output={output} holds no {publish.RECEIPT}, so it is no export and '
        'is not overwritten; give a new path'
    )


def _check_done(
    workdir: epath.Path, config: ConfigDict, request: Request
) -> None:
  """Raises where the stage has not made what is to be exported."""
  stage = request.stage
  trainer = 'ppo' if stage == 'critic' else stage
  if workdir_lib.read_done(workdir, trainer) is None:
    if why := sources.given_stages(config, workdir).get(stage):
      raise ExportError(
          f'stage {stage!r} was not trained in {workdir}: {why}; export that '
          'where it was made'
      )
    raise ExportError(
        f'stage {trainer!r} of {workdir} is not done; run it to its end: '
        f'{_command(workdir)}'
    )
  if stage == 'critic' and not BASELINES[config.ppo.baseline].has_critic:
    raise ExportError(
        f'{workdir} has no critic: it was trained with ppo.baseline='
        f'{config.ppo.baseline!r}; choose another --stage'
    )
  products.check_unchanged(workdir, stage)
  adapter = epath.Path(products.adapter(workdir, stage))
  if request.adapter and not adapter.exists():
    raise ExportError(
        f'stage {stage!r} of {workdir} has no adapters (lora.rank='
        f'{config.lora.rank}; a model from random weights learns whole); leave '
        'out --adapter'
    )
  public = not request.adapter or _public_base(workdir, config, request)
  if request.push_to_hub and not public:
    raise ExportError(
        f'--push_to_hub={request.push_to_hub}: the adapters go on top of a '
        'folder of this machine, which others lack; publish that and name it '
        'by --base=user/name, or export merged, without --adapter'
    )


def _command(workdir: epath.Path) -> str:
  """The command that the last start of a run was given."""
  starts = sorted(workdir.glob('run-[0-9]*.json'))
  arguments = manifest.read_sealed(starts[-1])['command'][1:]
  return f'python -m ma_rlhf_jax.train {shlex.join(arguments)}'


def _public_base(
    workdir: epath.Path, config: ConfigDict, request: Request
) -> str:
  """Hub id of what the adapters go on top of; '' = a folder here."""
  return request.base or lineage.public_name(
      sources.base(config, workdir, request.stage)
  )


def _summary(receipt: dict) -> str:
  """One line: what was written, and who read it back how well."""
  found = [
      f'{name} {", ".join(_words(values))}'
      for name, values in receipt['readers'].items()
      if values is not None
  ]
  return (
      f'{receipt["stage"]} in {receipt["dtype"]}, read back on '
      f'{receipt["rows"]} prompts by {"; by ".join(found)}'
  )


def _words(values: dict[str, float]) -> list[str]:
  return [
      f'{name.replace("_", " ")} {value:.3g}'
      for name, value in values.items()
      if not name.endswith('allowed')
  ]


def main(argv: list[str]) -> None:
  """Exports what the flags name."""
  values = flags.FLAGS
  checkpoint.quiet_logging()
  # As Ctrl-C does, it leaves nothing of a folder that is not whole.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    if len(argv) > 1 or not values.workdir or not values.output:
      raise ExportError(
          'usage: python -m ma_rlhf_jax.export --workdir=DIR --output=OUT '
          '[--stage=ppo]; --help lists all flags'
      )
    names = [field.name for field in dataclasses.fields(Request)]
    request = Request(**{name: values[name].value for name in names})
    print(export(request), flush=True)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  absl_flags.define(verbs.EXPORT.flags)
  app.run(main, flags_parser=absl_flags.parse)
