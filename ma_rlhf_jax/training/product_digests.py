"""Whether what a stage has made is still as it was written.

done.json of a stage holds the digest of the manifest of each folder that the
stage has made; the manifest holds those of the files.
"""

import logging

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.training import products

_log = logging.getLogger(__name__)
_REMEDY = 'the folder is made again from the last checkpoint'


def digests(workdir: epath.PathLike, stage: str) -> dict[str, str]:
  """Folder in the workdir -> digest of its manifest, of what a stage has made.

  Args:
    workdir: of the run.
    stage: 'sft', 'reward_model' or 'ppo'.
  """
  root = epath.Path(workdir)
  made = {}
  for part in (stage, 'critic') if stage == 'ppo' else (stage,):
    for folder in (
        products.product(workdir, part),
        products.adapter(workdir, part),
    ):
      if (found := manifest.digest_of(folder)) is not None:
        made[str(epath.Path(folder).relative_to(root))] = found
  return made


def discard_damaged(config: ConfigDict, workdir: epath.PathLike) -> None:
  """Marks stages as not done whose product is no longer as it was written.

  They go on after their last checkpoint, which makes the product again. One
  process calls this.

  Raises:
    DamagedError: if the stage is none of the config's, so that it is not run,
      and the folder is there, so that it could be used.
  """
  for stage in ('sft', 'reward_model', 'ppo'):
    done = workdir_lib.read_done(workdir, stage) or {}
    try:
      for name, digest in done.get('products', {}).items():
        folder = epath.Path(workdir) / name
        manifest.verify(folder, remedy=_REMEDY)
        manifest.check_digest(folder, digest, remedy=_REMEDY)
    except manifest.DamagedError as error:
      if stage not in config.stages and folder.exists():
        raise manifest.DamagedError(
            f'{error}, if {stage!r} is in stages'
        ) from error
      if stage in config.stages:
        _log.warning('%s', error)
        workdir_lib.mark_undone(workdir, stage)
