"""A workdir with finished stages, made without training."""

import dataclasses
import json
import pathlib
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.data import synthetic
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import (
    exporting,
    huggingface,
    lora,
    peft_folder,
    presets,
)
from ma_rlhf_jax.models.presets import GemmaConfig, Lora
from ma_rlhf_jax.publishing import card
from ma_rlhf_jax.structs import Params
from ma_rlhf_jax.training import products, sources
from tests import tiny
from tests.models.drawn import draw

# Eight devices cannot split its width, so one serves: less to compile.
SHAPE = dataclasses.replace(
    tiny.SHAPE, vocab_size=310, num_layers=1, embed_dim=20, num_heads=4
)
GEMMA2 = dataclasses.replace(
    SHAPE,
    family='gemma2',
    query_pre_attn_scalar=6.0,
    attn_softcap=5.0,
    final_softcap=20.0,
    sliding_window=8,
    sliding_layers=(True,),
)
COMPARISON = {
    'rows': {
        'kl': {
            'sft': [0.0, 0.0, 0.0],
            'ppo': [4.5, 4.25, 4.75],
            'difference': [4.5, 4.25, 4.75],
        },
        'win rate by gold': {'ppo': [0.75, 0.5, 1.0]},
    },
    'prompts': 12,
    'settings': {'evaluate.prompts': 256, 'evaluate.temperature': 1.0},
}


@dataclasses.dataclass(frozen=True)
class Made:
  """The workdir, its config, its tokenizer and its parameters by stage."""

  workdir: epath.Path
  config: ConfigDict
  tokenizer: Any
  shape: GemmaConfig
  params: dict[str, Params]


def config(shape: GemmaConfig = SHAPE, **fields: Any) -> ConfigDict:
  """Of a run on synthetic rows with models of that shape."""
  model = {f'model__{n}': getattr(shape, n) for n in presets.SHAPE_FIELDS}
  del model['model__sliding_layers']  # follows from the window
  defaults = {'data__synthetic_rows': 40, 'data__eval_rows': 12}
  defaults |= {'data__max_prompt_len': 96, 'data__max_response_len': 96}
  return tiny.config(**{**model, **defaults, **fields})


def tokenizer(folder: pathlib.Path) -> Any:
  """One trained on synthetic rows, written to `folder`."""
  rows = synthetic.make_rows(20, seed=0, label_noise=0.0)
  texts = [text for row in rows for text in row.values()]
  tokenizer_lib.train_tokenizer(texts, 300, str(folder))
  return tokenizer_lib.load_tokenizer(str(folder))


def make(
    root: pathlib.Path,
    shape: GemmaConfig = SHAPE,
    adapters: Lora | None = None,
    **fields: Any,
) -> Made:
  """All stages done: SFT 3, reward model 4 and PPO 5 updates.

  Args:
    root: the workdir is `root / 'run'`; models with adapters start from
      `root / 'base'`.
    shape: of all models.
    adapters: of all models; None = they were trained whole.
    **fields: of the config, as `tiny.config` takes them.
  """
  words = tokenizer(root / 'tokenizer')
  if adapters is not None:
    base = draw('policy', shape, seed=1)
    exporting.save(root / 'base', base, shape, 'policy', words)
    fields = {
        'sft__init': str(root / 'base'),
        'lora__rank': adapters.rank,
        'lora__alpha': adapters.alpha,
        'lora__targets': adapters.targets,
        **fields,
    }
  made = config(shape, **fields)
  workdir = workdir_lib.open_workdir(root / 'run', made)
  trained = dataclasses.replace(shape, lora=adapters)
  found = Made(workdir, made, words, trained, {})
  for seed, stage in enumerate(('sft', 'reward_model', 'ppo', 'critic'), 2):
    found.params[stage] = _train(found, stage, seed)
  for step, stage in enumerate(('sft', 'reward_model', 'ppo'), 3):
    lines = [
        {'step': step, 'stage': stage, 'eval/loss': 0.5, 'loss/x': 9.0},
        {'step': step, 'stage': stage, 'critic/value': 0.25},
    ]
    (workdir / stage / 'metrics').mkdir()
    (workdir / stage / 'metrics' / '0001-0001.jsonl').write_text(
        ''.join(json.dumps(line) + '\n' for line in lines)
    )
    workdir_lib.mark_done(workdir, stage, {'step': step})
  (workdir / 'evaluate').mkdir()
  comparison = json.dumps(COMPARISON)
  (workdir / 'evaluate' / 'comparison.json').write_text(comparison)
  return found


def _train(made: Made, stage: str, seed: int) -> Params:
  """Writes the product of a stage; its parameters, drawn by `seed`."""
  kind, shape = card.kind(stage), made.shape
  params = draw(kind, shape, seed)
  if shape.lora is not None:
    params = _frozen(made, stage) | lora.flatten(lora.split(shape, params)[1])
    params = lora.unflatten(params)
  folder = products.product(made.workdir, stage)
  exporting.save(folder, params, shape, kind, made.tokenizer)
  if shape.lora is not None:
    base = sources.base(made.config, made.workdir, stage)
    folder = products.adapter(made.workdir, stage)
    peft_folder.save(folder, params, shape, kind, base=base, card='')
  return params


def _frozen(made: Made, stage: str) -> dict[str, Any]:
  """Path -> array of what a stage starts from, as its own parameters."""
  base = sources.base(made.config, made.workdir, stage)
  kind = 'scalar' if stage == 'critic' else 'policy'
  shape = dataclasses.replace(made.shape, lora=None)
  params = huggingface.load_params(base, shape, kind)
  if stage == 'reward_model':
    params = {'backbone': params}
  return lora.flatten(params)
