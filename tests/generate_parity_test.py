"""Greedy text of `generate` against that of transformers, for both families."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pytest

from ma_rlhf_jax import generate
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.generation.request import Request
from ma_rlhf_jax.models import exporting
from ma_rlhf_jax.models.presets import GemmaConfig
from tests.models.drawn import UNUSUAL, draw

torch = pytest.importorskip('torch')

_ROWS, _NEW = 64, 128
_TIE = 1e-3  # two logits so close may change places
_AGREE = 60  # rows that agree to their end; ties are rare
# Its window is shorter than every sequence, and it caps where it matters.
_GEMMA2 = dataclasses.replace(
    UNUSUAL,
    family='gemma2',
    query_pre_attn_scalar=7,
    attn_softcap=3.0,
    final_softcap=2.0,
    sliding_window=24,
    sliding_layers=(True, False, True),
)


class Texts(NamedTuple):
  """What both sides said to the same prompts.

  Attributes:
    ours: ids of each response.
    theirs: the same.
    model: of transformers.
    prompts: ids of each prompt.
  """

  ours: list[list[int]]
  theirs: list[list[int]]
  model: Any
  prompts: list[list[int]]


def _prompt_texts() -> list[str]:
  """64 texts of 1 to 70 characters, of any kind."""
  random = np.random.default_rng(0)
  alphabet = list('the cat sat on a dog, then\n<é😀')
  lengths = np.linspace(1, 70, _ROWS).astype(int)
  texts = [''.join(random.choice(alphabet, n)) for n in lengths]
  return [texts[i] for i in random.permutation(_ROWS)]


def _ours(folder: pathlib.Path, texts: list[str]) -> list[list[int]]:
  source, target = folder / 'prompts.jsonl', folder / 'responses.jsonl'
  lines = [json.dumps({'prompt': text}) + '\n' for text in texts]
  source.write_text(''.join(lines))
  request = Request(
      model=str(folder / 'hf'),
      input=str(source),
      output=str(target),
      temperature=0.0,
      max_new_tokens=_NEW,
      dtype='float32',
      batch_size=16,
  )
  generate.run(request)
  rows = [json.loads(line) for line in target.read_text().splitlines()]
  assert [row['prompt'] for row in rows] == texts
  return [row['response_ids'] for row in rows]


def _theirs(model: Any, prompts: list[list[int]]) -> list[list[int]]:
  """All prompts in one batch, padded on the left."""
  width = max(map(len, prompts))
  tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
  mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
  with torch.no_grad():
    found = model.generate(
        tokens, attention_mask=mask, max_new_tokens=_NEW, do_sample=False
    )
  rows = found[:, width:].tolist()
  return [r[: r.index(1) + 1] if 1 in r else r for r in rows]


@pytest.fixture(scope='module', params=['gemma', 'gemma2'])
def texts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Texts:
  import transformers

  folder = tmp_path_factory.mktemp(request.param)
  shape: GemmaConfig = {'gemma': UNUSUAL, 'gemma2': _GEMMA2}[request.param]
  words = ['the cat sat on the mat', 'a dog ran after the cat'] * 9
  tokenizer_lib.train_tokenizer(words, 300, str(folder / 'words'))
  tokenizer = tokenizer_lib.load_tokenizer(str(folder / 'words'))
  params = draw('policy', shape, seed=0)
  exporting.save(folder / 'hf', params, shape, 'policy', tokenizer)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder / 'hf', attn_implementation='eager', dtype=torch.float32
  ).eval()
  written = _prompt_texts()
  prompts = tokenizer(written, split_special_tokens=True)['input_ids']
  assert {p[0] for p in prompts} == {2}  # BOS
  ours, theirs = _ours(folder, written), _theirs(model, prompts)
  return Texts(ours, theirs, model, prompts)


def _gap(model: Any, tokens: list[int]) -> float:
  """How far the best logit after `tokens` is above the second."""
  with torch.no_grad():
    logits = model(torch.tensor([tokens])).logits[0, -1]
  best = torch.topk(logits, 2).values
  return float(best[0] - best[1])


def _first_difference(ours: list[int], theirs: list[int]) -> int:
  """Index of the first token that differs; the length where none does."""
  pairs = zip(ours, theirs, strict=False)
  same = min(len(ours), len(theirs))
  first = next((i for i, (a, b) in enumerate(pairs) if a != b), same)
  return first if first < max(len(ours), len(theirs)) else len(ours)


def test_the_first_difference_by_hand() -> None:
  assert _first_difference([5, 6, 7], [5, 6, 7]) == 3
  assert _first_difference([5, 6, 7], [5, 8, 7]) == 1
  assert _first_difference([5, 6], [5, 6, 7]) == 2


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers(texts: Texts) -> None:
  agree = 0
  rows = zip(texts.prompts, texts.ours, texts.theirs, strict=True)
  for prompt, ours, theirs in rows:
    if ours == theirs:
      agree += 1
      continue
    first = _first_difference(ours, theirs)
    assert _gap(texts.model, prompt + theirs[:first]) < _TIE
  assert agree >= _AGREE


@pytest.mark.slow
def test_the_comparison_sees_much(texts: Texts) -> None:
  assert len(texts.prompts) == len(texts.ours) == _ROWS
  lengths = {len(prompt) for prompt in texts.prompts}
  assert min(lengths) < 5 and max(lengths) > 64 and len(lengths) > 30
  assert sum(len(row) == _NEW for row in texts.ours) > _ROWS // 2
  # Text that repeats itself, or is the same for every prompt, shows little.
  assert len(set(map(tuple, texts.ours))) > 50
  assert np.mean([len(set(row[-64:])) for row in texts.ours]) > 8
