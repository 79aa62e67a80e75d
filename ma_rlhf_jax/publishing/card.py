"""The README.md of a model: a hub model card that says how it was made."""

from collections.abc import Iterator
import dataclasses
import json
import pathlib
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import yaml

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.publishing import card_tables, lineage
from ma_rlhf_jax.publishing.card_tables import plain
from ma_rlhf_jax.training import sources

GEMMA_NOTICE = (
    'Gemma is provided under and subject to the Gemma Terms of Use found at '
    'ai.google.dev/gemma/terms'
)
_PAPER = '[MA-RLHF](https://arxiv.org/abs/2410.02743)'
# By task; see `example_prompt`.
_PROMPTS = {
    'hh': '\n\nHuman: How do I boil an egg?\n\nAssistant:',
    'synthetic': 'My boss was late today.\nTL;DR:',
}
_PROMPT = 'The best way to learn a language is'


@dataclasses.dataclass(frozen=True)
class Subject:
  """The model that a card is about.

  Attributes:
    config: of the run that made it.
    workdir: of that run.
    stage: 'sft', 'reward_model', 'ppo' or 'critic'.
    shape: of the model.
    model_path: what a reader loads: a hub id or a folder.
    step: updates of the stage; None = as its marker says.
    base: of an adapter folder, what the adapters go on top of; '' = the folder
      holds the whole model.
    receipt: of the export, see `models.export_check`.
  """

  config: ConfigDict
  workdir: epath.Path
  stage: str
  shape: GemmaConfig
  model_path: str
  step: int | None = None
  base: str = ''
  receipt: dict[str, Any] | None = None

  @property
  def kind(self) -> str:
    """'policy' or 'scalar'."""
    return kind(self.stage)

  @property
  def trainer(self) -> str:
    """The stage that trained it; the critic's is PPO."""
    return 'ppo' if self.stage == 'critic' else self.stage


def example_prompt(task: str) -> str:
  """What a prompt of a task looks like; never a row of the data."""
  return _PROMPTS.get(task, _PROMPT)


def kind(stage: str) -> str:
  """'policy' or 'scalar': what the model of a stage is."""
  return 'policy' if stage in ('sft', 'ppo') else 'scalar'


def text(subject: Subject) -> str:
  """The whole card: metadata, then Markdown."""
  base = lineage.base_model(subject.config, subject.stage)
  gemma = lineage.is_gemma(base, subject.shape)
  metadata = yaml.safe_dump(
      _metadata(subject, base, gemma), sort_keys=False, allow_unicode=True
  )
  title = pathlib.PurePath(subject.model_path).name
  sections = [
      f'# {plain(title)}',
      f'{_what(subject)}, made with {_PAPER} in JAX (`ma_rlhf_jax`).',
      *([f'> {GEMMA_NOTICE}.'] if gemma else []),
      '## How it was made',
      '\n'.join(f'- {line}' for line in _history(subject, base)),
      '## Usage',
      f'```python\n{_snippet(subject)}\n```',
      *_notes(subject),
      '## Settings',
      card_tables.settings(subject.config, subject.stage),
      *_measured(subject),
      '## Licence',
      _licence(base, gemma),
  ]
  return f'---\n{metadata}---\n\n' + '\n\n'.join(sections) + '\n'


def _metadata(subject: Subject, base: str, gemma: bool) -> dict[str, Any]:
  """The front matter; names that mean nothing on the hub are left out."""
  found: dict[str, Any] = {}
  on_hub = subject.base or base
  if lineage.is_hub_id(on_hub):
    found['base_model'] = on_hub
  if lineage.is_hub_id(subject.config.data.path):
    found['datasets'] = [subject.config.data.path]
  if gemma:
    found['license'] = 'gemma'
  generates = subject.kind == 'policy'
  found['library_name'] = 'peft' if subject.base else 'transformers'
  found['pipeline_tag'] = (
      'text-generation' if generates else 'text-classification'
  )
  tags = ['rlhf', 'ma-rlhf', 'macro-actions', subject.stage.replace('_', '-')]
  return found | {'tags': [*tags, *(['lora'] if subject.base else [])]}


def _algorithm(config: ConfigDict) -> str:
  """'MA-PPO (variant ours, macro actions of 5 tokens)'."""
  m = config.macro
  if m.termination != 'fixed':
    size = f'macro actions by the rule {m.termination}'
  elif m.ngram == 1:
    return f'PPO (variant {m.variant}, one token per macro action)'
  elif m.ngram:
    size = f'macro actions of {m.ngram} tokens'
  else:
    size = 'one macro action per response'
  return f'MA-PPO (variant {m.variant}, {size})'


def _what(subject: Subject) -> str:
  learned = 'Low-rank adapters of ' if subject.base else ''
  names = {
      'sft': 'a policy after supervised fine-tuning',
      'reward_model': 'a reward model',
      'ppo': f'a policy after {_algorithm(subject.config)}',
      'critic': f'the critic of {_algorithm(subject.config)}',
  }
  name = learned + names[subject.stage]
  return plain(name[0].upper() + name[1:])


def _origin(name: str, on_hub: str) -> str:
  """A link to what has a place on the hub; else no more than a last name."""
  if lineage.is_hub_id(name):
    return f'[{plain(name)}](https://huggingface.co/{on_hub}{name})'
  return f'the local {plain(pathlib.PurePath(name).name)}'


def _history(subject: Subject, base: str) -> Iterator[str]:
  """One line for the start, the rows, and each stage up to this one."""
  c = subject.config
  yield f'Start: {_origin(base, "") if base else "random weights"}'
  rows = _origin(c.data.path, 'datasets/') if c.data.path else ''
  yield ', '.join(filter(None, [f'Rows: task {plain(c.data.task)}', rows]))
  titles = {
      'sft': 'Supervised fine-tuning',
      'reward_model': 'Reward model',
      'ppo': plain(_algorithm(c)),
  }
  given = sources.given_stages(c, subject.workdir)
  for stage, title in titles.items():
    if stage in given:
      yield f'{title}: taken from another run or model'
    elif step := _step(subject, stage):
      yield f'{title}: {step} updates of {c[stage].batch_size} rows'
    if stage == subject.trainer:
      return


def _step(subject: Subject, stage: str) -> int | None:
  if stage == subject.trainer and subject.step is not None:
    return subject.step
  return (workdir_lib.read_done(subject.workdir, stage) or {}).get('step')


def _snippet(subject: Subject) -> str:
  """Python that loads the model and uses it once."""
  policy = subject.kind == 'policy'
  task = 'CausalLM' if policy else 'SequenceClassification'
  prompt = example_prompt(subject.config.data.task)
  path = 'base_path' if subject.base else 'model_path'
  labels = ', num_labels=1' if subject.base and not policy else ''
  lines = [
      *(['from peft import PeftModel'] if subject.base else []),
      f'from transformers import AutoModelFor{task}, AutoTokenizer',
      '',
      *([f'base_path = {_quoted(subject.base)}'] if subject.base else []),
      f'model_path = {_quoted(subject.model_path)}',
      '',
      f'tokenizer = AutoTokenizer.from_pretrained({path})',
      f'model = AutoModelFor{task}.from_pretrained({path}, '
      f"torch_dtype='auto'{labels})",
      *(
          ['model = PeftModel.from_pretrained(model, model_path)']
          if subject.base
          else []
      ),
      '',
      f'input_text = {_quoted(prompt)}',
      "inputs = tokenizer(input_text, return_tensors='pt')",
  ]
  if policy:
    lines += [
        'outputs = model.generate(**inputs, max_new_tokens=20)',
        'print(tokenizer.decode(outputs[0], skip_special_tokens=True))',
    ]
  else:
    lines += ['print(model(**inputs).logits[0, 0].item())']
  return '\n'.join(lines)


def _notes(subject: Subject) -> Iterator[str]:
  if subject.base == lineage.NO_NAME:
    yield (
        'The adapters go on top of a model that has no public name. '
        '`base_path` is the folder or hub id of that very model; no other '
        'will do, not even the one that it was trained from.'
    )
  if subject.kind == 'scalar':
    yield (
        'The number is the score of a prompt and its response, read at the '
        'last token; a response that ended by itself has the EOS token there.'
    )
  if subject.shape.attn_softcap:
    yield (
        'With transformers 4 pass `attn_implementation="eager"`; its other '
        'kernels leave out the bound of the attention scores.'
    )


def _measured(subject: Subject) -> Iterator[str]:
  """What training measured, and what the export did."""
  measured = list(
      card_tables.metrics(subject.config, subject.workdir, subject.stage)
  )
  yield from ['## Metrics', *measured] if measured else []
  if receipt := subject.receipt:
    yield '## Check of the files'
    yield (
        f'Read back on {receipt["rows"]} prompts and compared with the source; '
        'see `export_check.json`, which also has the SHA-256 of each file.'
    )
    yield card_tables.check(receipt)


def _quoted(value: str) -> str:
  """A Python string literal on one line."""
  return json.dumps(value, ensure_ascii=False)


def _licence(base: str, gemma: bool) -> str:
  if gemma:
    return (
        f'{GEMMA_NOTICE}. The weights were modified by the training described '
        'above.'
    )
  if base:
    return 'That of the model it started from.'
  return (
      'Trained from random weights; whoever publishes it chooses the licence.'
  )
