"""The files of comparisons in a workdir: numbers, prompts and settings.

<workdir>/evaluate/comparison.json             with the run's own settings
<workdir>/evaluate/comparison-prompts=16.json  with others, which its name says
<workdir>/evaluate/verdict.json                codes of symptoms of a failed run
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import atomic_file, manifest
from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.parallel import processes

OWN = 'comparison.json'
_PREFIX = 'evaluate.'


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What two policies say to the same prompts.

  Attributes:
    rows: name -> column -> (mean, low, high), see `evaluate.summarise`.
    prompts: how many each answered; None in files that do not tell it.
    settings: the fields `evaluate.*` that it was made with.
  """

  rows: dict[str, Any]
  prompts: int | None
  settings: dict[str, Any]


def settings(config: ConfigDict) -> dict[str, Any]:
  """The fields of a config that decide how policies are compared."""
  flat = config_lib.flatten(config)
  return {k: v for k, v in flat.items() if k.startswith(_PREFIX)}


def file_name(own: Mapping[str, Any], used: Mapping[str, Any]) -> str:
  """The file of a comparison made with the settings `used`.

  Args:
    own: settings that the workdir was started with.
    used: settings of the comparison.
  """
  others = [
      f'{name.removeprefix(_PREFIX)}={value}'
      for name, value in sorted(used.items())
      if own.get(name) != value
  ]
  return f'comparison-{",".join(others)}.json' if others else OWN


def write(
    workdir: epath.Path, made: Comparison, symptoms: Sequence[str] = ()
) -> epath.Path:
  """Writes a comparison, and replaces one made with the same settings only.

  The run's own result is also what the marker of the stage `evaluate` holds,
  and beside it lies `verdict.json`, the list of the symptoms' codes. Every
  process must call this; the first one writes.

  Returns:
    The file.
  """
  _, config = workdir_lib.read_config(workdir)
  path = workdir / 'evaluate' / file_name(settings(config), made.settings)
  record = dataclasses.asdict(made)
  with processes.together():
    if processes.is_first():
      path.parent.mkdir(parents=True, exist_ok=True)
      manifest.write_sealed(path, record)
  if path.name == OWN:
    write_verdict(workdir, symptoms)
    workdir_lib.mark_done(workdir, 'evaluate', {'comparison': record})
  return path


def write_verdict(workdir: epath.Path, symptoms: Sequence[str]) -> None:
  """Writes the codes of the symptoms of a run; see `write` for processes."""
  path = workdir / 'evaluate' / 'verdict.json'
  with processes.together():
    if processes.is_first():
      path.parent.mkdir(parents=True, exist_ok=True)
      atomic_file.write_json(path, list(symptoms))


def read(workdir: epath.Path) -> list[Comparison]:
  """The run's own comparison; where there is none, those of other settings.

  Raises:
    DamagedError: if a file is not as it was written.
  """
  folder = workdir / 'evaluate'
  own = folder / OWN
  paths = [own] if own.exists() else sorted(folder.glob('comparison-*.json'))
  return [_parsed(manifest.read_sealed(path)) for path in paths]


def _parsed(found: dict[str, Any]) -> Comparison:
  if 'rows' in found:
    return Comparison(**found)
  return Comparison(found, None, {})  # of an earlier version: rows alone
