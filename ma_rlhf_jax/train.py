"""Trains by SFT, reward model and macro-action PPO, and compares.

The stages that the config lists run one after another. A stage that is done is
skipped, and one that was cut off resumes from its newest checkpoint. The
comparison at the end is made at every start.

Exit codes:
  0    The run is done.
  1    An error that rerunning will not fix.
  75   Preempted by SIGTERM (a checkpoint is saved), or a peer process was lost.
       The same command resumes; so it does after a crash.
  130  Interrupted by Ctrl-C. The same command resumes.
"""

from collections.abc import Callable
from contextlib import ExitStack
import shlex
import sys
import time
from typing import Any, NoReturn

from ma_rlhf_jax import interrupts
from ma_rlhf_jax.commands import command, verbs

if __name__ == '__main__':  # before the imports below, which take seconds
  interrupts.end_on_ctrl_c(
      'interrupted; the same command goes on from the newest checkpoint, or '
      'begins the stage anew'
  )
  command.answer(verbs.TRAIN)

from absl import app, flags
import jax
from ml_collections import ConfigDict, config_flags

from ma_rlhf_jax import (
    cluster_flags,
    recipe_flag,
    switches,
    validation,
    workdir_lock,
)
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.commands import absl_flags
from ma_rlhf_jax.data import batch_sizes, parts
from ma_rlhf_jax.evaluate import compare
from ma_rlhf_jax.evaluation import comparison
from ma_rlhf_jax.models import exporting, folders, lora, peft_folder
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.objective.targets import BASELINES
from ma_rlhf_jax.parallel import host_memory, processes
from ma_rlhf_jax.parallel.mesh import matmul_precision
from ma_rlhf_jax.ppo.stage import PPO
from ma_rlhf_jax.publishing import card
from ma_rlhf_jax.scorers import functions
from ma_rlhf_jax.structs import Models
from ma_rlhf_jax.training import (
    automatic,
    checkpoint,
    health,
    loading,
    metrics,
    origins,
    product_digests,
    products,
    sources,
    symptoms,
    wandb_login,
)
from ma_rlhf_jax.training.loop import run_stage
from ma_rlhf_jax.training.reward_model import RewardModel
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.sft import SFT
from ma_rlhf_jax.training.start import load_run

absl_flags.define(verbs.TRAIN.flags)

# What a user can mend, before the first stage and in one.
_SET_UP_ERRORS = (ValueError, OSError, ImportError, processes.ProcessError)
_ERRORS = (
    metrics.NonFiniteError,
    health.RuinedError,
    checkpoint.CheckpointError,
    folders.NoSpaceError,
    products.SourceError,
    functions.RewardError,
    processes.ProcessError,
)


def _finish(
    run: Run, name: str, step: int, exports: dict, **facts: Any
) -> None:
  """Writes the folders of a stage's models, then its marker."""
  for stage, (kind, shape, params) in exports.items():
    folder = products.product(run.workdir, stage)
    # A start that was killed before the marker may have left the folder.
    exporting.save(folder, params, shape, kind, run.tokenizer, overwrite=True)
    if shape.lora is not None:
      _save_adapter(run, stage, step, kind, shape, params)
  facts |= {'batch_size': run.config[name].batch_size}
  made = product_digests.digests(run.workdir, name)
  workdir_lib.mark_done(
      run.workdir, name, {'step': step, 'products': made, **facts}
  )


def _save_adapter(
    run: Run, stage: str, step: int, kind: str, shape: GemmaConfig, params: Any
) -> None:
  """Writes what a stage's adapters learned, beside its merged model."""
  folder = products.adapter(run.workdir, stage)
  base = sources.base(run.config, run.workdir, stage)
  subject = card.Subject(
      run.config, run.workdir, stage, shape, folder, step=step, base=base
  )
  peft_folder.save(
      folder,
      params,
      shape,
      kind,
      base=base,
      card=card.text(subject),
      overwrite=True,
  )


def _say_learning(name: str, shape: GemmaConfig, params: Any) -> None:
  """Prints how much of a model learns in a stage."""
  if jax.process_index() == 0:
    print(f'{name}: {lora.describe(shape, params)} learn', flush=True)


def train_sft(run: Run) -> None:
  """SFT, from `sft.init` or random weights to `sft/hf`."""
  origins.check(run, 'sft')
  stage = SFT(run, *loading.initial_policy(run))
  _say_learning(stage.name, stage.shape, stage.params(stage.states))
  states, step = run_stage(stage)
  exports = {'sft': ('policy', stage.shape, stage.params(states))}
  _finish(run, 'sft', step, exports, symptoms=stage.watch.found)


def train_reward_model(run: Run) -> None:
  """The reward model, from the SFT policy to `reward_model/hf`."""
  origins.check(run, 'reward_model')
  stage = RewardModel(run, *loading.initial_reward_model(run))
  _say_learning(stage.name, stage.shape, stage.params(stage.states))
  states, step = run_stage(stage)
  exports = {'reward_model': ('scalar', stage.shape, stage.params(states))}
  _finish(run, 'reward_model', step, exports, symptoms=stage.watch.found)


def _ppo_models(run: Run) -> tuple[Models, Models]:
  """Shapes and parameters of the four models of PPO."""
  config, workdir = run.config, run.workdir
  source = sources.source(config, workdir, 'ppo')
  ref_policy = loading.load(run, source, 'policy')
  policy = loading.load_to_train(run, source, 'policy', 'policy', ref_policy)
  reward_model = critic = None
  if functions.has_model(config):
    source = sources.source(config, workdir, 'score')
    reward_model = loading.load(run, source, 'scalar')
  if BASELINES[config.ppo.baseline].has_critic:
    critic = loading.initial_critic(run, ref_policy, reward_model)
  none = (None, None)
  loaded = Models(policy, ref_policy, critic or none, reward_model or none)
  shapes, params = zip(*loaded, strict=True)
  return Models(*shapes), Models(*params)


def train_ppo(run: Run) -> None:
  """MA-PPO, from SFT policy and reward model to `ppo/hf`."""
  origins.check(run, 'ppo')
  stage = PPO(run, *_ppo_models(run))
  params = stage.params(stage.states)
  _say_learning('ppo, policy', stage.configs.policy, params.policy)
  if params.critic is not None:
    _say_learning('ppo, critic', stage.configs.critic, params.critic)
  del params  # the first update takes their memory
  states, step = run_stage(stage)
  params = stage.params(states)
  exports = {'ppo': ('policy', stage.configs.policy, params.policy)}
  if params.critic is not None:
    exports['critic'] = ('scalar', stage.configs.critic, params.critic)
  _finish(run, 'ppo', step, exports, symptoms=stage.watch.found)


STAGES: dict[str, Callable[[Run], None]] = {
    'sft': train_sft,
    'reward_model': train_reward_model,
    'ppo': train_ppo,
    'evaluate': compare,
}


def train(run: Run) -> None:
  """Runs the stages of a run that are not done."""
  given = sources.given_stages(run.config, run.workdir)
  for name in run.config.stages:
    done = bool(workdir_lib.read_done(run.workdir, name))
    if processes.preempted():
      raise processes.Preempted(f'stopped before {name}')
    if name in given:
      print(f'{name}: skipped, {given[name]}')
    elif processes.agreed(done) and name != 'evaluate':
      print(f'{name}: done before, in {run.workdir / name}')
    else:
      start = time.monotonic()
      STAGES[name](run)
      print(f'{name}: done in {time.monotonic() - start:.0f} s', flush=True)


def _smaller(config: ConfigDict, run: Run, to_train: list[str]) -> list[str]:
  """A note for each batch that was made smaller; raises if it cannot serve."""
  notes = batch_sizes.describe(config, run.config, run.data.num_rows, to_train)
  if notes:
    devices = run.mesh.shape['data'] * run.mesh.shape['fsdp']
    try:
      validation.refuse(validation.problems(run.config, devices))
    except validation.ConfigError as error:
      raise validation.ConfigError('\n'.join([*notes, str(error)])) from error
  return notes


def _open(config: ConfigDict, path: str) -> tuple[Run, list[str], list[str]]:
  """The run in its workdir, once it is checked, stages to train, and notes."""
  if processes.is_first():
    wandb_login.check(config.log.sinks)
  workdir = workdir_lib.open_workdir(path, config)
  if processes.is_first():
    product_digests.discard_damaged(config, workdir)
  done = [stage for stage in STAGES if workdir_lib.read_done(workdir, stage)]
  validation.refuse(validation.missing_products(config, done))
  run = load_run(config, workdir, check_models=True)
  to_train = sources.stages_to_train(config, workdir)
  notes = _smaller(config, run, to_train)
  if 'ppo' in to_train and (host := run.host_termination()):
    host.close()
  return run, to_train, notes


def set_up(config: ConfigDict, recipe: str, workdir: str | None) -> Run:
  """Everything that can be checked at the start is checked here.

  The first process prepares the data, the others then read what it wrote. What
  fails on one fails on all.
  """
  path = workdir or workdir_lib.default_workdir(recipe, config)
  found = validation.problems_here(config)
  if found and not workdir_lib.is_started(path):
    found += validation.missing_products(config)
  validation.refuse(found)
  to_abandon = processes.is_first() and not workdir_lib.is_started(path)
  try:
    run, to_train, notes = processes.first_then_rest(
        lambda: _open(config, path)
    )
  except workdir_lib.WorkdirError:
    raise  # the folder is not this run's
  except _SET_UP_ERRORS:
    if to_abandon:
      workdir_lib.abandon(path)
    raise
  print(f'workdir: {run.workdir}')
  for line in sources.describe(config):
    print(line)
  print(parts.describe_counts(run.data.counts))
  print(f'     columns: {run.prompt_len} prompt, {run.response_len} response')
  for note in notes:
    print(f'note: {note}')
  if 'ppo' in to_train:
    print(switches.describe(config))
  if chosen := automatic.describe(config, run.config):
    print(chosen)
  warnings = validation.warnings(config)
  warnings += parts.few_updates(run.config, run.data, to_train)
  for warning in warnings:
    print(f'warning: {warning}')
  sys.stdout.flush()
  return run


def _shell_quoted(text: str) -> str:
  """`text` as one word of bash or zsh; nothing in it reaches the terminal."""
  escapes = {'\\': '\\\\', "'": "\\'", '\n': '\\n', '\t': '\\t'}
  spell = lambda c: c if c.isprintable() else f'\\U{ord(c):08x}'
  return "$'" + ''.join(escapes.get(c) or spell(c) for c in text) + "'"


def _own_prompt(run: Run) -> str:
  """The shortest of the first held-out prompts that can be typed."""
  rows = run.data.eval.prompt
  prompts = [run.text(rows[i]) for i in range(min(64, len(rows)))]
  typed = [p for p in prompts if p.strip() and '\0' not in p]
  return min(typed, key=len, default='')


def _try_it(run: Run) -> str:
  """Where everything is, and a command that uses the policy."""
  told = f'workdir: {run.workdir}'
  if any(workdir_lib.read_done(run.workdir, s) for s in ('ppo', 'sft')):
    told += (
        f'\ntry it: {shlex.quote(sys.executable)} -m ma_rlhf_jax.generate '
        f'--model={shlex.quote(str(run.workdir))} '
        f'--prompt={_shell_quoted(_own_prompt(run))}'
    )
  return told


def _out_of_memory(error: jax.errors.JaxRuntimeError) -> str:
  """One line: where it was, what helps, and what the device said."""
  where = ''.join(f' ({note})' for note in getattr(error, '__notes__', ()))
  return (
      f'the devices have too little memory{where}; make micro_batch_size of '
      'the stage, rollout.batch_size or model.logprob_chunk smaller, spread '
      'the weights by mesh.fsdp, or train adapters (:lora), in a new '
      '--workdir; --config.ppo.from=WORKDIR takes over what is trained: '
      f'{str(error).splitlines()[0]}'
  )


def main(argv: list[str]) -> None:
  """Sets up the run that the flags describe, and trains it."""
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments: {argv[1:]}')
  checkpoint.quiet_logging()
  host_memory.keep_freed()
  try:
    cluster_flags.initialize()
  except ValueError as error:
    sys.exit(f'error: {error}')
  processes.catch_preemption()
  with processes.ending_together():
    _run(config_flags.get_config_filename(flags.FLAGS['config']))


def _hold(config: ConfigDict, recipe: str, stack: ExitStack) -> str:
  """The path of the workdir, which is this run's until the stack is left."""
  path = flags.FLAGS.workdir or workdir_lib.default_workdir(recipe, config)
  with processes.together():
    if processes.is_first():
      stack.enter_context(workdir_lock.hold(workdir_lib.place(path)))
  return path


def _run(recipe: str) -> None:
  with ExitStack() as stack:
    config = recipe_flag.CONFIG.value
    try:
      run = set_up(config, recipe, _hold(config, recipe, stack))
    except _SET_UP_ERRORS as error:
      _exit(error)
    _train(run)


def _train(run: Run) -> None:
  precision = matmul_precision(run.config.model.matmul_precision)
  with jax.set_mesh(run.mesh), precision:
    try:
      train(run)
      print(_try_it(run), flush=True)
    except symptoms.SymptomError as error:
      comparison.write_verdict(run.workdir, error.codes)
      _exit(error)
    except _ERRORS as error:
      _exit(error)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      _exit(RuntimeError(_out_of_memory(error)))
    except processes.Preempted as why:
      print(f'told to stop: {why}; the same command goes on', flush=True)
      sys.exit(processes.EXIT_AGAIN)


def _exit(error: Exception) -> NoReturn:
  """Ends every process with the error that all have; the first one tells."""
  sys.exit(f'error: {error}' if processes.is_first() else 1)


if __name__ == '__main__':
  app.run(main, flags_parser=recipe_flag.parse)
