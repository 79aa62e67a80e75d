"""What a field or flag that takes a model stands for.

It is a Hugging Face folder, a hub id, or the workdir of a run. Everywhere a
workdir stands for the last of its finished stages that fits the role, and
`WORKDIR:sft` for another one.

Every product is a Hugging Face folder: what a stage trained lies in
`<workdir>/<stage>/hf` (the critic of PPO in `<workdir>/ppo/critic`).
"""

import dataclasses
import re

from etils import epath

from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib


class SourceError(ValueError):
  """A model that a field or flag names cannot be used."""


# Role -> stages of a workdir whose product serves by default, the last first,
# and others that serve where they are named.
ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'policy': (('ppo', 'sft'), ()),
    'reward model': (('reward_model',), ('critic',)),
    'critic': (('critic', 'reward_model'), ()),
    'tokenizer': (('ppo', 'sft', 'reward_model'), ('critic',)),
}
# Product -> the fields by which a run is given it instead of training it.
_GIVEN_BY = {
    'sft': ('policy_init', 'from_run'),
    'reward_model': ('reward_model', 'from_run'),
}
_FUNCTION = re.compile(r'[A-Za-z_][\w.]*:[A-Za-z_]\w*')


@dataclasses.dataclass(frozen=True)
class Source:
  """A model that already exists, or will once its stage is done.

  Attributes:
    field: the config field or flag that names it; '' = made by this run.
    path: its Hugging Face folder or hub id.
    workdir: of the run that made it, where the field names a workdir; else ''.
    stage: of that run, whose product it is.
  """

  field: str
  path: str
  workdir: str = dataclasses.field(default='', compare=False)
  stage: str = dataclasses.field(default='', compare=False)

  def describe(self) -> str:
    """`ppo.policy_init: runs/x/sft/hf, stage sft of the workdir runs/x`."""
    made = f', stage {self.stage} of the workdir {self.workdir}'
    return f'{self.field}: {self.path}{made if self.stage else ""}'


def product(workdir: epath.PathLike, stage: str) -> str:
  """The folder of a stage's model in a workdir."""
  folder = 'ppo/critic' if stage == 'critic' else f'{stage}/hf'
  return str(epath.Path(workdir) / folder)


def adapter(workdir: epath.PathLike, stage: str) -> str:
  """The folder of a stage's adapters in a workdir, beside its model."""
  folder = 'ppo/critic_adapter' if stage == 'critic' else f'{stage}/adapter'
  return str(epath.Path(workdir) / folder)


def locate(field: str, value: str, role: str, stage: str = '') -> Source:
  """The model that `value` stands for.

  Args:
    field: config field or flag, for messages.
    value: a folder, a hub id, a workdir or `WORKDIR:STAGE`. A folder that has
      a name of the last form is that folder.
    role: a key of `ROLES`.
    stage: the stage whose product is taken, where the field itself says so;
      `value` must be a workdir then.

  Raises:
    SourceError: if the workdir has no such stage, if it is not done, or if the
      value names none where it must.
  """
  if value.startswith('~'):
    value = str(epath.Path(value).expanduser())
  workdir, named = _workdir(field, value, role)
  if stage and (named or not workdir):
    raise SourceError(
        f'{field}={value} must be the workdir of a run, whose SFT policy and '
        'reward model are taken; name single models by ppo.policy_init and '
        'ppo.reward_model'
    )
  if not workdir:
    return Source(field, value)
  stage = _finished(field, value, workdir, role, stage or named)
  check_unchanged(workdir, stage)
  return Source(field, product(workdir, stage), workdir, stage)


def check_unchanged(workdir: epath.PathLike, stage: str) -> None:
  """Raises where a product is no longer the one that its stage has made.

  The digest of the folder's manifest is compared, not that of its files, which
  whoever loads them compares with the manifest.

  Args:
    workdir: of the run.
    stage: whose product it is; 'critic' for that of PPO.

  Raises:
    DamagedError: with the folder, and what makes it anew.
  """
  done = workdir_lib.read_done(workdir, 'ppo' if stage == 'critic' else stage)
  folder = product(workdir, stage)
  name = str(epath.Path(folder).relative_to(epath.Path(workdir)))
  wanted = (done or {}).get('products', {}).get(name)
  if wanted:
    manifest.check_digest(
        folder,
        wanted,
        remedy=f'run the train command of {workdir} again, which makes the '
        'folder anew from the checkpoint',
    )


def split(value: str) -> tuple[str, str]:
  """(folder, stage) of `WORKDIR:STAGE`; the stage is '' in any other value.

  Only a name that is not there itself, and has a stage without a slash, is of
  that form; whether the folder is a workdir is not asked.
  """
  head, _, stage = value.rpartition(':')
  if not head or '/' in stage or epath.Path(value).exists():
    return value, ''
  return head, stage


def _workdir(field: str, value: str, role: str) -> tuple[str, str]:
  """(workdir, named stage); empty where the value has none."""
  head, stage = split(value)
  if not workdir_lib.is_workdir(head):
    if stage:
      _refuse_name(field, value, head, role)
    return '', ''
  usual, others = ROLES[role]
  if stage and stage not in (*usual, *others):
    raise SourceError(
        f'{field}={value}: no stage {stage!r} of a workdir is a {role}; name '
        f'one of {", ".join((*usual, *others))}'
    )
  return head, stage


def _refuse_name(field: str, value: str, head: str, role: str) -> None:
  """Raises where a name with a colon is not what its writer takes it for."""
  if epath.Path(head).is_dir():
    raise SourceError(
        f'{field}={value}: {head} is no workdir of a run, so it has no stages; '
        'name the folder of a model alone'
    )
  if role == 'reward model' and _FUNCTION.fullmatch(value):
    raise SourceError(
        f'{field}={value} looks like a function; a score comes from a reward '
        'model: give its Hugging Face folder, its hub id, or a workdir'
    )


def _finished(
    field: str, value: str, workdir: str, role: str, named: str
) -> str:
  """The stage whose product is taken; raises where it is not done."""
  stages = (named,) if named else ROLES[role][0]
  for stage in stages:
    if _is_done(workdir, stage):
      return stage
  for stage in stages:
    if taken := _taken(workdir, stage):
      raise SourceError(
          f'{field}={value} is a workdir that did not train {stage!r}: {taken};'
          ' name that instead'
      )
  raise SourceError(
      f'{field}={value} is a workdir in which none of these stages is done: '
      f'{", ".join(stages)}; finish it (run its command again), or name a '
      'Hugging Face folder'
  )


def _is_done(workdir: str, stage: str) -> bool:
  trainer = 'ppo' if stage == 'critic' else stage
  done = workdir_lib.read_done(workdir, trainer)
  if done is None or stage != 'critic':
    return done is not None
  # Earlier versions of the marker named stages in place of folders.
  made = done.get('products') or done.get('params_sha256', ('critic',))
  return 'ppo/critic' in made or 'critic' in made


def _taken(workdir: str, stage: str) -> str:
  """`it took ppo.policy_init=x` where a run was given the stage's product."""
  _, config = workdir_lib.read_config(workdir)
  for name in _GIVEN_BY.get(stage, ()):
    if config.ppo[name]:
      shown = name.replace('from_run', 'from')
      return f'it took ppo.{shown}={config.ppo[name]}'
  return ''
