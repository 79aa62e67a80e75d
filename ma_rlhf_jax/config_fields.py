"""Every field of a run, with default, check, meaning, unit and source.

  name=Field(default, check, 'Meaning, with the unit.', source)

`config.base` makes the config of these. A new field is a line here; checks, the
fields that a run may change when it is resumed, `--config.help` and
`configuration.md` follow from it. Those of the trained stages stand in
`stage_fields`. All are laid out by hand, in as few lines as they can be.
"""

from ma_rlhf_jax import stage_fields
from ma_rlhf_jax.fields import (
    SWITCH,
    TEMPERATURE,
    TEXT,
    Block,
    Field,
    above,
    at_least,
    block,
    many,
    one_of,
    some_of,
    within,
)

# The matrices of a layer, any of which may get adapters (`lora.targets`).
KERNELS = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
STAGES = ('sft', 'reward_model', 'ppo', 'evaluate')

# Far above what anyone runs: a typing error is refused before anything of its
# size is made.
_ROWS, _COUNT = within(2, 10**8), within(1, 2**12)
_SEED = within(0, 2**32 - 1)  # what random generators take
_DTYPE = one_of('float32', 'bfloat16', 'float64')


def _best(default: str, *names: str, only: str = '') -> Field:
  signed = (f'{sign}eval/{name}' for name in names for sign in ('', '-'))
  meaning = f'Metric of the best checkpoint{only}; with - less is better.'
  return Field(default, one_of(*signed), meaning)


# fmt: off
BLOCKS: dict[str, Block] = {}
BLOCKS['run'] = block('Fields that stand in no block',
  seed=Field(0, _SEED, 'Seed of every random draw but those of the data.'),
  stages=Field(STAGES, some_of(*STAGES, in_order=True),
      'Stages to run.', resumable=True),
  reward=Field('model', TEXT,
      'What PPO maximises, in reward-model units: model (the score of the '
      'reward model), module:function of your own, or a sum, joined by +.'),
)
BLOCKS['model'] = block('The shape of models, their types, speed and memory',
  preset=Field('', one_of('', 'models.presets:PRESETS'),
      'Published shape of a model with random weights; empty: the fields from '
      'family to sliding_window give it. With sft.init its config.json does.'),
  family=Field('gemma', one_of('models.tensor_names:NORMS'),
      'Architecture; gemma2 adds post-attention and post-MLP norms.'),
  vocab_size=Field(0, within(0, 2**20),
      'Rows of the embedding; 0 = as many as the tokenizer has tokens.'),
  num_layers=Field(2, within(1, 200), 'Number of layers.'),
  embed_dim=Field(128, within(1, 2**15), 'Width of the hidden states.'),
  mlp_dim=Field(512, within(1, 2**18), 'Width inside of an MLP.'),
  num_heads=Field(4, within(1, 2**10), 'Query heads of a layer.'),
  num_kv_heads=Field(1, within(1, 2**10),
      'Key and value heads of a layer (grouped-query attention).'),
  head_dim=Field(32, within(1, 2**12), 'Numbers in a head.'),
  rope_theta=Field(10_000.0, above(0), 'Base of the rotary wavelengths.'),
  norm_eps=Field(1e-6, above(0), 'Added to the variance in RMSNorm.'),
  query_pre_attn_scalar=Field(0.0, at_least(0),
      'Attention logits are divided by its square root; 0 = head_dim.'),
  attn_softcap=Field(0.0, at_least(0),
      'Soft cap of attention logits; 0 = none.'),
  final_softcap=Field(0.0, at_least(0),
      'Soft cap of the logits over the vocabulary; 0 = none.'),
  sliding_window=Field(0, at_least(0),
      'Tokens that every other layer, from the first, attends to; 0 = all.'),
  dtype=Field('float32', _DTYPE,
      'Type of activations and matmuls; float64 needs JAX_ENABLE_X64=1.'),
  matmul_precision=Field('default', one_of('parallel.mesh:PRECISIONS'),
      'Precision of float32 matmuls: default = as JAX is set (float32 on CPUs, '
      'TF32 with 10 bits on NVIDIA GPUs since Ampere, bfloat16 with 8 on '
      'TPUs), high = TF32 or three bfloat16 products, highest = float32.'),
  param_dtype=Field('float32', _DTYPE, 'Type of the trained weights.'),
  remat=Field('auto', one_of('auto', 'models.gemma:REMAT'), 'What the backward '
      'pass recomputes of a layer: all (full), all but matrix products (dots) '
      'or attention, or nothing (none).', resumable=True),
  unroll=Field(-1, at_least(-1),
      'Layers in one iteration of the loop over layers; 0 = all, without a '
      'loop, -1 = auto. More compile longer and copy less.', resumable=True),
  attention=Field('auto', one_of('auto', 'xla', 'models.kernels:KERNELS'),
      'Kernel of training and scoring: splash on TPUs, cudnn on GPUs. '
      'sft.loss_on=everything and reward_model.loss=authors take xla.',
      resumable=True),
  frozen_memory=Field('device', one_of('parallel.partition:MEMORIES'),
      'Where models that are not trained wait between uses.', resumable=True),
  logprob_chunk=Field(0, at_least(0),
      'Tokens per chunk of the vocabulary head, which bounds the logits that a '
      'device holds at once; 0 = auto.', resumable=True),
)
BLOCKS['lora'] = block('Low-rank adapters; the base weights stay frozen',
  rank=Field(0, within(0, 2**12),
      'Rank of the adapters; 0 = none, all weights are trained.'),
  alpha=Field(32.0, above(0, 1e6),
      'The product of the two factors is scaled by alpha / rank.'),
  targets=Field(KERNELS, some_of(*KERNELS, least=1),
      'Matrices of a layer that get adapters.'),
)
BLOCKS['tokenizer'] = block('The tokenizer',
  path=Field('', TEXT,
      'Folder or hub id of it; empty: that of sft.init, else it is trained.'),
  vocab_size=Field(1024, within(0, 2**20),
      'Tokens of a tokenizer that is trained on the SFT part.'),
)
BLOCKS['data'] = block('Where rows come from, and how long they may be',
  task=Field('synthetic', one_of('config:TASK_LENGTHS'),
      'Kind of rows. Those of tldr, webgpt and apps cannot be read yet; '
      'columns reads prompt, chosen and rejected from any three columns.'),
  path=Field('', TEXT,
      'Hub name, or a .jsonl[.gz], .json[.gz] or .parquet file or folder.'),
  subset=Field('', TEXT, 'Configuration of the data set on the hub.'),
  split=Field('train', TEXT, 'Split to train on.'),
  eval_path=Field('', TEXT,
      'Rows to evaluate on; empty, with eval_split empty too: held out.'),
  eval_split=Field('', TEXT,
      'Split to evaluate on, of eval_path, or of path where that is empty.'),
  eval_rows=Field(256, _ROWS,
      'Rows held out for evaluation, at most a quarter of all.'),
  max_rows=Field(0, at_least(0), 'Use only the first rows; 0 = all.'),
  prompt_column=Field('prompt', TEXT, 'Column of the prompt.'),
  chosen_column=Field('chosen', TEXT, 'Column of the preferred response.'),
  rejected_column=Field('rejected', TEXT, 'Column of the other response.'),
  parts=Field((2, 4, 4), many('three numbers of at least 0, not all 0', 0,
          lambda v: len(v) == 3 and any(v), whole=False),
      'Shares of the rows for SFT, reward model and PPO.', 'authors'),
  split_seed=Field(1234, _SEED, 'Seed of parts and held-out rows.', 'authors'),
  max_prompt_len=Field(0, within(0, 2**20), 'Longest prompt in tokens, BOS '
      'included; 0 = as long as the rows need, up to a limit of the task.'),
  max_response_len=Field(0, within(0, 2**20), 'Longest response in tokens, EOS '
      'included; 0 = as long as the rows need, up to a limit of the task.'),
  drop_truncated=Field(True, SWITCH,
      'Whether responses that are cut at the limit are kept out of SFT.'),
  cache_dir=Field('', TEXT,
      'Folder of tokenised rows; empty: WORKDIR/data.', resumable=True),
  synthetic_rows=Field(16000, within(1, 10**8), 'Rows of task=synthetic.'),
  label_noise=Field(0.1, within(0, 1),
      'Probability that a pair of task=synthetic is swapped.'),
  shuffle_labels=Field(False, SWITCH,
      'Control: a coin decides which response of a pair is preferred.'),
)
BLOCKS |= stage_fields.BLOCKS
BLOCKS['macro'] = block('Macro actions: where they end, how tokens are pooled',
  variant=Field('ours', one_of('switches:VARIANTS'),
      'Variant; --config=RECIPE:VARIANT sets it together with its values.'),
  termination=Field('fixed', one_of('macro.termination:RULES', 'parsing',
          'macro.text_rules:RULES', or_own=('inputs', 'settings')),
      'Rule that ends macro actions. parsing, sentences, clauses and python '
      'read the text on the CPU.'),
  ngram=Field(5, at_least(0),
      'Tokens per macro action; 0 = infinity, one macro action.', 'paper'),
  random_lengths=Field((2, 3, 5, 10),
      many('some whole numbers of at least 1', 1, lambda v: len(v) > 0),
      'Lengths, in tokens, that randomised shuffles.', 'paper'),
  random_repeats=Field(3, _COUNT, 'How often each length occurs.', 'paper'),
  random_leftover=Field('one', one_of('one', 'cycle'), 'What follows the '
      'random lengths: one macro action, or they again.', 'paper'),
  logprobs=Field('ref', one_of('ref', 'old'),
      'Policy whose log-probs the rules ppl, ppl_adjacent, ppl_authors and '
      'low_probability read: the reference, or the one that drew.', 'paper'),
  cut_probability=Field(0.9, above(0, 1),
      'With low_probability: a token below it is a cut point.', 'SPO'),
  cut_count=Field(5, at_least(1),
      'With low_probability: cut points per macro action.', 'SPO'),
  parser=Field('', TEXT, 'With parsing: module:function, a .jsonl file of '
      "trees, or 'command: ...'."),
  parse_cutoff=Field(5, at_least(1), 'With parsing: a constituent of fewer '
      'tokens is a macro action.', 'paper'),
  parse_fallback=Field('fixed', one_of('macro.host:FALLBACKS'),
      'Rule for a sentence without a tree; one = one macro action.'),
  parse_workers=Field(0, within(0, 2**12),
      'Processes that parse; 0 = none beside this one.', resumable=True),
  min_len=Field(1, at_least(1),
      'Least tokens of a macro action, whatever the rule says.'),
  max_len=Field(0, at_least(0),
      'Most tokens of a macro action, whatever the rule says; 0 = any.'),
  last_token_alone=Field(False, SWITCH,
      'The last token is a macro action of its own, as the authors have it.'),
  empty_step=Field(False, SWITCH,
      "The authors' step of no tokens stands before the last token."),
  reward=Field('sum', one_of('macro.aggregate:REWARD_WEIGHTS'),
      'How the rewards of its tokens are pooled: their sum (paper), their '
      'mean, or with more weight on earlier ones (authors).', 'paper'),
  value=Field('start', one_of('macro.aggregate:VALUE_WEIGHTS'),
      'How the values of its tokens are pooled: the first (start, as in an '
      'SMDP), the last (unit), their mean (equal, paper), or by weights that '
      'rise (position, paper) or fall (position_reversed, authors).'),
)
BLOCKS['rollout'] = block('How responses are drawn',
  temperature=Field(1.0, TEMPERATURE, 'Divides the logits; 0 = greedy.'),
  top_k=Field(0, at_least(0),
      'Only this many most probable tokens can be drawn; 0 = all.'),
  top_p=Field(1.0, within(1e-6, 1), 'Only the most probable tokens that '
      'together have this probability can be drawn; 1 = all.'),
  min_new_tokens=Field(0, at_least(0), 'Tokens before EOS can be drawn.'),
  batch_size=Field(0, at_least(0), 'Sequences decoded at once; 0 = all.'),
  tensor=Field(0, at_least(0),
      'Devices that share one copy of the weights; divides mesh.fsdp * '
      'mesh.tensor. 0 = as many as draw a token soonest.', resumable=True),
  int8_cache=Field(False, SWITCH,
      'Keys and values are cached in 8 bits, so that a token reads less.'),
)
BLOCKS['evaluate'] = block('The final comparison', resumable=True,
  prompts=Field(256, _ROWS, 'Held-out prompts that are answered.'),
  temperature=Field(1.0, TEMPERATURE, 'Divides the logits; 0 = greedy.'),
)
BLOCKS['stop'] = block('Symptoms of a failed run that end it', resumable=True,
  reward_model_at_chance=Field(False, SWITCH, 'The reward model is at chance.'),
  kl_above_max=Field(False, SWITCH, 'The KL is above ppo.max_kl.'),
  no_response_ends=Field(False, SWITCH, 'No response reaches EOS.'),
  one_token_repeated=Field(False, SWITCH, 'Responses repeat one token.'),
  entropy_collapsed=Field(False, SWITCH, "The policy's entropy collapsed."),
  score_below_sft=Field(False, SWITCH, 'The score is below that of SFT.'),
)
BLOCKS['mesh'] = block('Devices along each axis of the mesh', resumable=True,
  data=Field(-1, at_least(1, -1),
      'Groups of devices that have all weights each; -1 = all that are left. '
      'Over several TPU slices, a multiple of their number.'),
  fsdp=Field(1, at_least(1, -1),
      'Devices that share weights and rows; -1 = all that are left.'),
  tensor=Field(1, at_least(1, -1),
      'Devices that share each matrix product; -1 = all that are left.'),
)
BLOCKS['checkpoint'] = block('Checkpoints', resumable=True,
  every=Field(100, at_least(0), 'Updates between checkpoints; 0 = at the end.'),
  keep=Field(2, at_least(1), 'Newest checkpoints kept beside the best.'),
  best_metric=dict(
    sft=_best('-eval/loss', 'loss'),
    reward_model=_best('eval/accuracy', 'accuracy', 'margin', 'loss'),
    ppo=_best('eval/score', 'score', 'kl', 'policy_kl', 'length', 'ended',
        'gold', only=', of those whose eval/kl is at most ppo.max_kl'),
  ),
)
BLOCKS['export'] = block('What a stage hands over', resumable=True,
  which=Field('last', one_of('last', 'best'),
      'Checkpoint that a stage ends with. With best, a quarter of the held-out '
      'prompts choose it, and the final comparison is on the others.'),
)
BLOCKS['log'] = block('Metrics and samples', resumable=True,
  every=Field(1, at_least(1), 'Updates between lines of metrics.'),
  sinks=Field(('jsonl', 'tensorboard'), some_of('training.metrics:SINKS'),
      'Where metrics are written.'),
  samples=Field(4, at_least(0), 'Rows of the table of samples; 0 = no table.'),
)
BLOCKS['profile'] = block('A profiler trace', resumable=True,
  steps=Field((), many('() or (first, last), whole numbers of at least 1', 1,
          lambda v: len(v) in (0, 2) and list(v) == sorted(v)),
      'First and last update of it, from 1; () = none.'),
  stage=Field('ppo', one_of(*STAGES[:3]), 'Stage that is traced.'),
)
# fmt: on


# By whole name, as in `ppo.kl_coef`.
FIELDS: dict[str, Field] = {
    name if of == 'run' else f'{of}.{name}': field
    for of, block in BLOCKS.items()
    for name, field in block.fields.items()
}
