"""A request with its models: what it draws, and what it checks first."""

from collections.abc import Iterator
import dataclasses
import types

import pytest

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.generation import session as session_lib
from ma_rlhf_jax.generation.request import Request
from ma_rlhf_jax.generation.session import Session
from ma_rlhf_jax.training.products import SourceError
from tests import served, tiny

PROMPT = '\n\nHuman: né?\n\nAssistant:'


@pytest.fixture(scope='module')
def store(tmp_path_factory: pytest.TempPathFactory) -> served.Store:
  return served.store(tmp_path_factory.mktemp('store'))


@pytest.fixture(scope='module')
def scripted(
    store: served.Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
  folder = tmp_path_factory.mktemp('scripted')
  model = served.scripted(folder, store.tokenizer, PROMPT, ' né,😀!')
  request = Request(
      model, temperature=0.0, max_new_tokens=16, max_prompt_len=40
  )
  with session_lib.opened(request, session_lib.find(request)) as session:
    yield session


def test_settings_are_those_of_the_request(scripted: Session):
  request = dataclasses.replace(
      scripted.request, temperature=0.5, top_k=7, top_p=0.75
  )
  settings = dataclasses.replace(scripted, request=request).settings
  assert (settings.temperature, settings.top_k, settings.top_p) == (
      0.5,
      7,
      0.75,
  )
  assert settings.max_new_tokens == 16 and settings.min_new_tokens == 0
  assert (settings.eos_id, settings.pad_id) == (1, 0)


def test_a_session_responds_and_makes_rows(scripted: Session):
  (batch,) = scripted.respond([scripted.prompt_ids(PROMPT)])
  (row,) = scripted.rows({'prompt': PROMPT, 'id': 3}, batch)
  assert row['response'] == ' né,😀!' and row['id'] == 3
  ids = tokenizer_lib.encode(scripted.tokenizer, ' né,😀!')
  assert row['response_ids'] == [*ids, 1]
  assert row['num_tokens'] == len(ids) + 1
  assert row['logprob'] == pytest.approx(0, abs=0.01)  # all but sure


def test_answers_come_in_pieces_of_whole_characters(scripted: Session):
  pieces = list(scripted.answer(PROMPT))
  assert ''.join(pieces) == ' né,😀!' and len(pieces) > 2


def test_a_prompt_fits_up_to_the_limit(scripted: Session):
  length = len(scripted.prompt_ids(PROMPT))
  assert scripted.prompt_ids(PROMPT)[0] == 2
  for limit, fits in ((length, True), (length - 1, False)):
    request = dataclasses.replace(scripted.request, max_prompt_len=limit)
    assert dataclasses.replace(scripted, request=request).fits(PROMPT) == fits


def test_long_prompts_are_named(store: served.Store):
  names = ['line 1', 'line 2']
  texts = ['the cat', 'sat ' * 20]
  request = Request('m', input='a.jsonl', max_prompt_len=10)
  with pytest.raises(ValueError, match='--input=a.jsonl: line 2 has 2. token'):
    session_lib.encode(request, store.tokenizer, texts, names)
  request = Request('m', prompt=texts[1], max_prompt_len=10)
  with pytest.raises(ValueError, match='--prompt: the prompt has 2. tokens'):
    session_lib.encode(request, store.tokenizer, texts[1:], ['the prompt'])
  ids = session_lib.encode(request, store.tokenizer, texts[:1], names[:1])
  assert ids[0][0] == 2


def test_models_are_found_and_compared(store: served.Store):
  request = Request(store.finished, reward_model=store.workdir)
  found = session_lib.find(request)
  assert (
      found.policy.source.stage == 'ppo' and found.reward_model.kind == 'scalar'
  )
  assert found.policy.shape.dtype == 'float32'  # on a CPU
  assert [model.kind for model in found.models] == ['policy', 'scalar']
  alone = session_lib.find(Request(store.policy, dtype='bfloat16'))
  assert alone.policy.shape.dtype == 'bfloat16' and len(alone.models) == 1
  with pytest.raises(SourceError, match='its tokenizer differs'):
    session_lib.find(Request(store.policy, reward_model=store.foreign))


def test_programs_are_traced_with_the_precision_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
):
  model = types.SimpleNamespace(
      shape=tiny.SHAPE, tokenizer=None, load=tiny.matmuls_are_exact
  )
  monkeypatch.setattr(session_lib.finished, 'check_mesh', lambda *_: None)
  request = Request('m', prompt='', matmul_precision='highest')
  request.check()
  with session_lib.opened(request, session_lib.Found(model, None)) as session:
    assert session.models.policy == (tiny.SHAPE, True)
    assert tiny.matmuls_are_exact()
  with pytest.raises(ValueError, match='--matmul_precision=tf32 must be one'):
    dataclasses.replace(request, matmul_precision='tf32').check()
