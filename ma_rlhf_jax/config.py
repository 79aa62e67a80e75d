"""Every field of a run, with meaning, unit and source; validation; arguments.

A recipe is a file with

    from ma_rlhf_jax.config import apply_arguments, base

    def get_config(arguments: str = ''):
      config = base()
      config.ppo.kl_coef = 0.1
      return apply_arguments(config, arguments)

Sources: `paper` is arXiv 2410.02743, `authors` is ernie-research/MA-RLHF.
Validation lives in `validation.py`.
"""

import hashlib
import json
import pathlib
from typing import Any

import ml_collections
from ml_collections import ConfigDict

from ma_rlhf_jax import switches
from ma_rlhf_jax.arguments import ArgumentError

# The matrices of a layer, any of which may get adapters (`lora.targets`).
KERNELS = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')

# Field -> its value that reads hidden states of padding. Kernels differ there,
# so that these losses are always computed with plain attention.
LOSSES_ON_PADDING = {
    'sft.loss_on': 'everything',
    'reward_model.loss': 'authors',
}


def _optim(lr: float, warmup_ratio: float = 0.1) -> ConfigDict:
  """AdamW with the authors' betas, decay and clipping."""
  c = ConfigDict()
  c.lr = lr  # peak learning rate
  c.schedule = 'cosine'  # cosine | linear | constant, after the warm-up
  c.warmup_ratio = warmup_ratio  # of all updates of the stage
  c.final_lr_ratio = 0.0  # of lr, where the decay ends
  c.b1 = 0.9  # authors
  c.b2 = 0.95  # authors
  c.eps = 1e-8
  c.weight_decay = 0.1  # authors; norm weights are never decayed
  c.clip_norm = 1.0  # global gradient norm, authors; 0 = no clipping
  c.moment_dtype = 'float32'  # of Adam's two moments, whatever the weights are:
  # float32 (at least) | bfloat16 (half the memory)
  return c


def _model() -> ConfigDict:
  """The shape of a model that starts from random weights, and dtypes."""
  c = ConfigDict()
  # The shape fields count only where `sft.init` is empty; otherwise the
  # config.json of that folder decides.
  c.preset = ''  # a published shape by name, gemma-7b say; '' = the next fields
  c.family = 'gemma'  # gemma | gemma2, whose blocks also norm what they add
  c.vocab_size = 0  # rows of the embedding; 0 = as many as the tokenizer has
  c.num_layers = 2
  c.embed_dim = 128
  c.mlp_dim = 512
  c.num_heads = 4
  c.num_kv_heads = 1
  c.head_dim = 32
  c.rope_theta = 10_000.0
  c.norm_eps = 1e-6
  c.query_pre_attn_scalar = 0.0  # scores are divided by its root; 0 = head_dim
  c.attn_softcap = 0.0  # bound of attention scores; 0 = none
  c.final_softcap = 0.0  # bound of logits; 0 = none
  c.sliding_window = 0  # tokens, in every other layer from the first; 0 = none
  c.dtype = 'float32'  # of activations and matmuls: float32 | bfloat16 |
  # float64 (needs JAX_ENABLE_X64=1)
  # Of matmuls in float32: default (as jax is set: float32 on CPUs, TF32, with
  # 10 bits, on NVIDIA GPUs since Ampere, bfloat16 products, with 8, on TPUs) |
  # high (TF32, or three products of bfloat16) | highest (float32 everywhere)
  c.matmul_precision = 'default'
  c.param_dtype = 'float32'  # of the trained weights
  # What the backward pass recomputes of a layer: full | dots (all but matrix
  # products) | attention (all but attention) | none | auto (README).
  c.remat = 'auto'
  # Layers in one iteration of the loop over them; 0 = all, and no loop; -1 =
  # auto. More of them compile for longer and are copied less.
  c.unroll = -1
  # Kernel in training and scoring: auto | xla | splash (TPU) | cudnn (GPU). A
  # loss over padding (loss_on=everything, loss=authors) takes xla.
  c.attention = 'auto'
  # Where the models that do not learn wait between uses: device | host
  c.frozen_memory = 'device'
  c.logprob_chunk = 0  # tokens; a device holds as many logits as they have; 0 =
  # auto
  return c


def _lora() -> ConfigDict:
  """Low-rank adapters of what is trained; its weights stay frozen then."""
  c = ConfigDict()
  c.rank = 0  # 0 = no adapters: all weights are trained
  c.alpha = 32.0  # the product of the two factors is scaled by alpha / rank
  c.targets = KERNELS
  return c


def _data() -> ConfigDict:
  """Where rows come from and how long they may be."""
  c = ConfigDict()
  c.task = 'synthetic'  # synthetic | hh | columns; tldr | webgpt | apps name
  # the data of published recipes, whose rows cannot be read yet
  c.path = ''  # hub name, or .jsonl[.gz] / .json / .parquet file or folder
  c.subset = ''  # the data set's configuration on the hub
  c.split = 'train'  # the data set's split to train on
  c.eval_path = ''  # rows to evaluate on; '' with eval_split '' = held out
  c.eval_split = ''  # a split of eval_path, or of path where that is ''
  c.eval_rows = 256  # rows held out for evaluation, at most a quarter of all
  c.max_rows = 0  # use only the first rows; 0 = all
  c.prompt_column = 'prompt'  # task=columns
  c.chosen_column = 'chosen'  # task=columns
  c.rejected_column = 'rejected'  # task=columns
  c.parts = (2, 4, 4)  # SFT : reward model : PPO, authors
  c.split_seed = 1234  # authors
  # Longest prompt (BOS included) and response (EOS included) in tokens; 0 = as
  # long as the rows need, at most what TASK_LENGTHS gives the task.
  c.max_prompt_len = 0
  c.max_response_len = 0
  c.drop_truncated = True  # keep responses cut at the limit out of SFT
  c.cache_dir = ''  # tokenised rows; '' = <workdir>/data
  c.synthetic_rows = 16000  # task=synthetic: rows to generate
  c.label_noise = 0.1  # task=synthetic: probability of a swapped pair
  c.shuffle_labels = False  # control: reward-model labels by coin toss
  return c


def _sft() -> ConfigDict:
  """Supervised fine-tuning."""
  c = ConfigDict()
  c.init = ''  # Hugging Face folder or id, or a workdir; '' = random
  c.epochs = 1.0  # passes over the SFT part
  c.steps = 0  # updates; 0 = from epochs
  c.batch_size = 64  # sequences per update
  c.micro_batch_size = 0  # sequences per gradient pass; 0 = batch_size
  c.loss_on = 'response'  # response | text | everything (authors: + pads)
  c.eval_every = 50  # updates; each checkpoint is evaluated too
  c.optim = _optim(2e-5)
  return c


def _reward_model() -> ConfigDict:
  """Reward modelling."""
  c = ConfigDict()
  c.init = ''  # folder, id or workdir; '' = this run's SFT
  c.epochs = 1.0
  c.steps = 0
  c.batch_size = 64  # pairs per update
  c.micro_batch_size = 0  # pairs per gradient pass
  c.loss = 'per_token'  # per_token | last_token | authors
  c.num_padding_at_beginning = 0  # loss=authors; Gemma needs 0
  c.eval_every = 50
  c.optim = _optim(1e-5)
  return c


def _ppo() -> ConfigDict:
  """MA-PPO and its policy."""
  c = ConfigDict()
  c.policy_init = ''  # folder, id or workdir; '' = this run's SFT
  c.reward_model = ''  # folder, id or workdir; '' = this run's own
  c.critic_init = ''  # folder, id or workdir; '' = the reward model
  c.from_run = ''  # a workdir whose SFT and reward model are reused; also
  # spelt --config.ppo.from=DIR (`from` is a Python keyword)
  c.epochs = 1.0  # passes over the PPO prompts
  c.steps = 0  # updates of the whole batch; 0 = from epochs
  c.batch_size = 256  # prompts per step, paper
  c.samples_per_prompt = 1
  c.ppo_epochs = 1  # passes over one batch of rollouts, paper
  c.minibatches = 1  # optimizer updates per such pass, paper
  # Full-length sequences per forward pass; shorter ones are more to a pass.
  # 0 = all, or with several widths a sixteenth of them.
  c.micro_batch_size = 0
  # Widths to which rows are padded for scoring and updates: 1 = that of the
  # longest possible; 0 = six from 512 tokens on, else one.
  c.length_buckets = 0
  # Score and learn in one forward pass where that is exact: joint (gradients
  # of policy and critic exist at once) | policy | off | auto.
  c.one_pass = 'auto'
  c.kl_coef = 0.05  # weight of the per-token KL in the reward, paper
  c.kl_estimator = 'k1'  # in the reward; no other has the right gradient
  c.kl_target = 0.0  # nats per response that kl_coef adapts to; 0 = fixed. Of
  # objective/kl, which is not the KL of the policies where a filter is on
  c.kl_horizon = 10_000  # responses in which it can change by a factor of e^.2;
  # above a fifth of those of a step, or it could fall to 0 for ever
  c.score_clip = 2.5  # reward-model units, authors; 0 = no clipping
  c.clip_eps = 0.2  # paper
  c.gamma = 1.0  # paper
  c.discount = 'macro'  # gamma per macro action (authors) | per token (SMDP)
  c.gae_lambda = 0.95  # per macro action, paper
  c.advantage = 'shared'  # by a macro action's tokens (paper) | own
  c.baseline = 'critic'  # critic | rloo (other samples of the prompt)
  c.whiten_advantages = False
  c.ratio = 'token'  # token (authors) | macro (paper) | geometric
  c.loss_reduction = 'sequence'  # sequence (authors) | token | macro | constant
  c.logprob_temperature = 0.0  # of log-probs in ratio and KL;
  # 0 = rollout.temperature
  c.critic_warmup_updates = 0  # steps in which only the critic learns
  c.max_kl = 30.0  # nats per response; bound on eval/kl of the best checkpoint,
  # of responses drawn as in training; eval/policy_kl is without filters
  c.eval_every = 10  # steps
  c.optim = _optim(1.5e-5)
  return c


def _critic() -> ConfigDict:
  """The critic of MA-PPO."""
  c = ConfigDict()
  c.target = 'token'  # token | macro (paper) | starts
  c.gae_lambda = -1.0  # of its returns; -1 = ppo.gae_lambda
  c.clip_eps = 0.2  # reward-model units, authors; 0 = no clipping
  c.optim = _optim(1.5e-5)
  return c


def _macro() -> ConfigDict:
  """Macro actions: where they end, how tokens are pooled."""
  c = ConfigDict()
  c.variant = 'ours'  # ours | paper | authors; set by --config=recipe.py:paper
  # On the device: fixed | randomised | ppl | ppl_adjacent | ppl_authors |
  # low_probability; on the host: parsing | sentences | clauses | python.
  c.termination = 'fixed'
  c.ngram = 5  # tokens, paper; 0 = infinity (one macro action)
  c.random_lengths = (2, 3, 5, 10)  # tokens, paper
  c.random_repeats = 3  # of each length, paper
  c.random_leftover = 'one'  # what follows: one (paper) | cycle
  c.logprobs = 'ref'  # of ppl* and low_probability: ref (paper) | old policy
  c.cut_probability = 0.9  # low_probability: below it is a cut point, SPO
  c.cut_count = 5  # low_probability: cut points per macro action, SPO
  # parsing: 'module:function', a .jsonl file of trees, or 'command: ...'.
  c.parser = ''
  c.parse_cutoff = 5  # tokens; a smaller constituent is a macro action, paper
  c.parse_fallback = 'fixed'  # of a sentence without a tree: fixed | one
  c.parse_workers = 0  # processes that parse; 0 = this one
  c.min_len = 1  # tokens, of every macro action of every rule
  c.max_len = 0  # tokens; 0 = no bound
  c.last_token_alone = False  # as a macro action of its own, authors
  c.empty_step = False  # the authors' step of no tokens before it
  c.reward = 'sum'  # sum (paper) | mean | position_reversed (authors)
  c.value = 'start'  # start (SMDP) | equal (paper) | unit | position (paper) |
  # position_reversed (authors)
  return c


def _rollout() -> ConfigDict:
  """How responses are drawn."""
  c = ConfigDict()
  c.temperature = 1.0
  c.top_k = 0  # 0 = off
  c.top_p = 1.0  # 1 = off
  c.min_new_tokens = 0  # tokens before EOS may be drawn
  c.batch_size = 0  # sequences decoded at once; 0 = all
  # Devices to one copy of the weights, which divide mesh.fsdp * mesh.tensor;
  # 0 = as many as draw a token soonest, see rollout/split.py.
  c.tensor = 0
  c.int8_cache = False  # keys and values in 8 bits: less to read for a token
  return c


def _evaluate() -> ConfigDict:
  """The final comparison."""
  c = ConfigDict()
  c.prompts = 256  # held-out prompts in the final comparison
  c.temperature = 1.0
  return c


def _stop() -> ConfigDict:
  """Symptoms of a failed run that end it, by their codes."""
  c = ConfigDict()
  c.reward_model_at_chance = False
  c.kl_above_max = False
  c.no_response_ends = False
  c.one_token_repeated = False
  c.entropy_collapsed = False
  c.score_below_sft = False
  return c


def base() -> ConfigDict:
  """A config with every field; recipes change what differs."""
  c = ConfigDict()
  c.seed = 0
  c.stages = ('sft', 'reward_model', 'ppo', 'evaluate')
  c.model = _model()
  c.lora = _lora()
  # What PPO maximises: 'model', the score of the reward model, or a function of
  # one's own, 'module:function', or a sum of such, joined by '+'; see
  # `scorers.functions`.
  c.reward = 'model'
  c.tokenizer = ConfigDict()
  c.tokenizer.path = ''  # folder or id; '' = that of sft.init, else trained
  c.tokenizer.vocab_size = 1024  # of a tokenizer trained on the SFT part
  c.data = _data()
  c.sft = _sft()
  c.reward_model = _reward_model()
  c.ppo = _ppo()
  c.critic = _critic()
  c.macro = _macro()
  c.rollout = _rollout()
  c.evaluate = _evaluate()
  c.stop = _stop()
  c.mesh = ConfigDict()
  c.mesh.data = -1  # devices along each axis; -1 = all that are left. Over
  # several TPU slices data is a multiple of their number
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  c.checkpoint = ConfigDict()
  c.checkpoint.every = 100  # updates between checkpoints
  c.checkpoint.keep = 2  # newest kept, beside the best; 2 = one to fall back on
  # What makes a checkpoint the best; '-' = less is better. In PPO only where
  # eval/kl <= ppo.max_kl.
  c.checkpoint.best_metric = ConfigDict()
  c.checkpoint.best_metric.sft = '-eval/loss'
  c.checkpoint.best_metric.reward_model = 'eval/accuracy'
  c.checkpoint.best_metric.ppo = 'eval/score'
  c.export = ConfigDict()
  # The checkpoint that a stage ends with: last | best. With best, a quarter of
  # the held-out prompts choose it and the final comparison is on the others.
  c.export.which = 'last'
  c.log = ConfigDict()
  c.log.every = 1  # updates between metric lines
  c.log.sinks = ('jsonl', 'tensorboard')  # and 'wandb'
  c.log.samples = 4  # rows in the table of sample responses; 0 = no table
  c.profile = ConfigDict()
  c.profile.steps = ()  # (first, last) update, from 1, of a profiler trace
  c.profile.stage = 'ppo'
  c.lock()
  return c


def published(init: str, preset: str) -> ConfigDict:
  """What the runs behind the published checkpoints have in common.

  Args:
    init: hub id of the model that SFT starts from.
    preset: its shape, a key of `models.presets.PRESETS`.

  Returns:
    `base()` in bfloat16 with 512 + 512 tokens, the paper's sampling, all
    weights sharded over all chips, and the authors' schedules in updates.
  """
  c = base()
  c.sft.init, c.model.preset = init, preset
  c.model.dtype = 'bfloat16'
  c.data.max_prompt_len = c.data.max_response_len = 512
  c.mesh.data, c.mesh.fsdp = 1, -1
  c.rollout.temperature, c.rollout.top_k = 0.8, 50
  c.ppo.one_pass = 'policy'  # one gradient tree at a time
  c.evaluate.prompts, c.evaluate.temperature = 2000, 0.8
  for optim in (c.ppo.optim, c.critic.optim):
    optim.schedule = 'linear'  # each recipe has a warm-up of its own
  return c


# Fields that may differ when a run is started again in its own workdir.
RESUMABLE = (
    'stages',
    'log.',
    'profile.',
    'checkpoint.',
    'export.',
    'evaluate.',
    'stop.',
    'mesh.',
    'model.remat',
    'model.unroll',
    'model.attention',
    'model.frozen_memory',
    'model.logprob_chunk',
    'data.cache_dir',
    'macro.parse_workers',
    'rollout.tensor',
    'ppo.length_buckets',
    'ppo.one_pass',
)

# What follows the colon in --config=recipe.py:word,name=value. Words are the
# variants, controls and set-ups of `switches`.
ARGUMENTS = {
    'ngram': ('macro.ngram', int),
    'seed': ('seed', int),
    'termination': ('macro.termination', str),
}


def apply_arguments(config: ConfigDict, arguments: str | None) -> ConfigDict:
  """`config` after the recipe arguments `word,name=value`.

  Variants and values are set in their order, then controls and set-ups, which
  are worked out from them.

  Args:
    config: what `base()` and the recipe made.
    arguments: the text after the colon of --config; may be empty.

  Raises:
    ArgumentError: on an unknown name, a value of the wrong type, or where two
      of them contradict each other.
  """
  controls, given, variant = [], {}, ''
  for item in filter(None, (arguments or '').split(',')):
    if item in switches.VARIANTS:
      if variant not in ('', item):
        raise ArgumentError(
            f'{variant} and {item} are two variants, each with values for the '
            'same fields; leave one of them out'
        )
      switches.select_variant(config, item)
      variant = item
      continue
    if item in switches.WORDS:
      controls.append(item)
      continue
    name, _, text = item.partition('=')
    if name not in ARGUMENTS:
      raise ArgumentError(
          f'recipe argument {name!r} is unknown; known are '
          f'{", ".join(sorted(ARGUMENTS))}, as in --config=recipe.py:ngram=5, '
          f'and the words {", ".join(switches.WORDS)}'
      )
    field, parse = ARGUMENTS[name]
    try:
      value = parse(text)
    except ValueError:
      raise ArgumentError(
          f'recipe argument {item!r}: {text!r} is not of type '
          f'{parse.__name__}; write for example {name}=5'
      ) from None
    if given.setdefault(field, (item, value))[1] != value:
      raise ArgumentError(
          f'{given[field][0]} and {item} contradict each other; leave one of '
          'them out'
      )
    config.update_from_flattened_dict({field: value})
  switches.select_controls(config, controls, given)
  return config


def default_recipe() -> str:
  """configs/tiny.py of the checkout, or its copy in an installed package."""
  package = pathlib.Path(__file__).parent
  for folder in (package.parent / 'configs', package / 'configs'):
    if (folder / 'tiny.py').is_file():
      return str(folder / 'tiny.py')
  return 'configs/tiny.py'


def flatten(config: ConfigDict) -> dict[str, Any]:
  """`{'ppo.kl_coef': 0.05, ...}` in a fixed order, tuples as lists."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      flat.update({f'{name}.{k}': v for k, v in flatten(value).items()})
    else:
      flat[name] = list(value) if isinstance(value, (tuple, list)) else value
  return dict(sorted(flat.items()))


def restore(flat: dict[str, Any]) -> ConfigDict:
  """The config of which `flat` is the `flatten`."""
  config = base()
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()}
  config.update_from_flattened_dict(values)
  return config


def fingerprint(config: ConfigDict) -> str:
  """SHA-256 (hex) of the resolved config."""
  return hashlib.sha256(json.dumps(flatten(config)).encode()).hexdigest()


def differences(stored: dict[str, Any], config: ConfigDict) -> list[str]:
  """Fields, not marked resumable, in which `config` differs from `stored`.

  Args:
    stored: `flatten` of the config that a workdir was started with.
    config: the config of this start.

  Returns:
    One line a field: its name, the stored value and the new one.
  """
  now = flatten(config)
  # A field that is newer than the run has had its default all along.
  stored = flatten(base()) | stored
  return [
      f'{name}: stored {stored.get(name)!r}, now {now.get(name)!r}'
      for name in sorted(stored.keys() | now.keys())
      if stored.get(name) != now.get(name)
      and not any(
          name == mark or (mark.endswith('.') and name.startswith(mark))
          for mark in RESUMABLE
      )
  ]


def num_steps(stage: ConfigDict, num_rows: int) -> int:
  """Updates of a stage: `steps`, or as many as `epochs` gives; at least 1."""
  if stage.steps:
    return stage.steps
  return max(1, int(stage.epochs * num_rows) // stage.batch_size)


# Prompt and response limits (tokens) of each task where the config gives 0:
# enough for most rows under a small tokenizer. The paper's are 512 and 512.
TASK_LENGTHS = {
    'synthetic': (24, 16),
    'hh': (320, 160),
    'columns': (320, 160),
    'tldr': (512, 512),
    'webgpt': (512, 512),
    'apps': (600, 512),
}


def lengths(config: ConfigDict) -> tuple[int, int]:
  """(prompt columns P, response columns T) in tokens."""
  prompt, response = TASK_LENGTHS[config.data.task]
  return (
      config.data.max_prompt_len or prompt,
      config.data.max_response_len or response,
  )
