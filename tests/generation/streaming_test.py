"""Text as it comes: whole characters, nothing twice, nothing of the stop."""

from typing import Any

import jax
import pytest

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.generation import responses, streaming
from ma_rlhf_jax.generation.responses import Models
from ma_rlhf_jax.generation.streaming import TextStream
from ma_rlhf_jax.rollout import decode
from tests import served, tiny

STOP = '\n\nHuman:'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
  return served.train_tokenizer(tmp_path_factory.mktemp('words'))


def _pieces(tokenizer: Any, ids: list[int], stop: str = '') -> list[str]:
  """What comes with each token, and at the end."""
  text = TextStream(tokenizer, stop)
  return [*[text.push([i]) for i in ids], text.finish()]


def _byte(value: int) -> int:
  return 4 + value  # ids of the byte tokens follow pad, eos, bos and unk


def test_a_character_comes_with_its_last_byte(tokenizer: Any):
  ids = tokenizer_lib.encode(tokenizer, 'né😀!')
  (n,) = tokenizer_lib.encode(tokenizer, 'n')
  assert ids == [n, *(_byte(b) for b in 'é😀!'.encode())]
  want = ['n', '', 'é', '', '', '', '😀', '!', '']
  assert _pieces(tokenizer, ids) == want


@pytest.mark.parametrize('size', [1, 2, 3, 5])
def test_pieces_join_to_the_text_and_hold_no_half(tokenizer: Any, size: int):
  said = 'the cat 😀 said “né, 日本” and ran.\n\nOh'
  ids = tokenizer_lib.encode(tokenizer, said)
  text = TextStream(tokenizer)
  pieces = [text.push(ids[i : i + size]) for i in range(0, len(ids), size)]
  assert '�' not in ''.join(pieces)
  assert ''.join([*pieces, text.finish()]) == said


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer: Any):
  ids = [*tokenizer_lib.encode(tokenizer, 'the'), _byte(0xE6), _byte(0x97)]
  pieces = _pieces(tokenizer, ids)
  assert '�' not in ''.join(pieces[:-1])
  assert ''.join(pieces) == streaming.plain_text(tokenizer, ids) == 'the��'


def test_broken_bytes_come_with_what_follows_them(tokenizer: Any):
  (n,) = tokenizer_lib.encode(tokenizer, 'n')
  assert _pieces(tokenizer, [n, _byte(0xC3), n, n])[:4] == ['n', '', '�n', 'n']


def test_special_tokens_are_no_text(tokenizer: Any):
  (n,) = tokenizer_lib.encode(tokenizer, 'n')
  assert _pieces(tokenizer, [2, n, 0, n, 1]) == ['', 'n', '', 'n', '', '']
  assert streaming.plain_text(tokenizer, [2, n, 0, n, 1]) == 'nn'


def test_text_that_may_become_the_stop_waits(tokenizer: Any):
  said = ' ran.\n\nHum.\n\nHuman: more'
  ids = tokenizer_lib.encode(tokenizer, said)
  text, pieces = TextStream(tokenizer, STOP), []
  for token in ids:
    pieces.append(text.push([token]))
    if text.stopped:
      break
  assert ''.join(pieces) == ' ran.\n\nHum.'
  assert text.finish() == '' and len(pieces) < len(ids)
  assert not any(piece.endswith('\n') for piece in pieces)


def test_the_start_of_a_stop_comes_when_nothing_follows(tokenizer: Any):
  ids = tokenizer_lib.encode(tokenizer, 'ran\n\nHuman')
  pieces = _pieces(tokenizer, ids, STOP)
  assert ''.join(pieces[:-1]) == 'ran' and pieces[-1] == '\n\nHuman'


PARAMS = tiny.params('policy', 7)
SETTINGS = decode.SamplingSettings(tiny.RESPONSE_LEN, tiny.EOS, tiny.PAD)


def _streamed(prompt: list[int], seed: int) -> list[list[int]]:
  models = Models(tiny.mesh(2, 1, 1), (tiny.SHAPE, PARAMS))
  with jax.set_mesh(models.mesh):
    return list(streaming.stream(models, prompt, SETTINGS, seed=seed))


@pytest.mark.slow
def test_the_stream_is_the_response_in_parts():
  models = Models(tiny.mesh(2, 1, 1), (tiny.SHAPE, PARAMS))
  prompt, lengths = [2, 5, 6, 3], set()
  for seed in range(6):
    with jax.set_mesh(models.mesh):
      ((want,),) = responses.respond(
          models, [prompt], SETTINGS, num_samples=1, seed=seed, batch_size=1
      )
    parts = _streamed(prompt, seed)
    assert [token for part in parts for token in part] == want.ids
    assert len(parts[0]) == 1 and max(map(len, parts)) <= 2
    lengths.add(len(want.ids))
  # One reached the limit, another ended before it.
  assert max(lengths) == tiny.RESPONSE_LEN > min(lengths)


def test_speech_ends_at_the_stop():
  models = Models(tiny.mesh(2, 1, 1), (tiny.SHAPE, PARAMS))
  letters: Any = tiny.Tokenizer()

  def say(seed: int, stop: str) -> str:
    options = {'seed': seed, 'stop': stop}
    pieces = streaming.speak(models, letters, [2, 9], SETTINGS, **options)
    return ''.join(pieces)

  with jax.set_mesh(models.mesh):
    whole, seed = max(
        ((say(s, ''), s) for s in range(6)), key=lambda x: len(x[0])
    )
    assert len(set(whole)) > 4
    assert say(seed, whole[3:5]) == whole[:3]
