"""Progress lines and sample tables, compared with text typed by hand."""

import io

import numpy as np
import pytest

from ma_rlhf_jax.training.console import Progress, one_line, samples_table


class _Terminal(io.StringIO):

  def isatty(self) -> bool:
    return True


class _Clock:
  """A clock that a test sets."""

  now = 100.0

  def __call__(self) -> float:
    return self.now


def test_rate_and_time_left_count_this_start_after_its_first_update():
  clock, stream = _Clock(), io.StringIO()
  with Progress(
      'ppo', 50, 30, seconds=5.0, stream=stream, clock=clock
  ) as progress:
    clock.now = 160.0  # compiling
    progress.update(31, 9999, 60.0, {'kl': 0.25})
    clock.now = 162.0  # too soon for another line
    progress.update(32, 3000, 2.0, {'kl': 0.5})
    clock.now = 190.0  # an evaluation between does not count
    progress.update(33, 6000, 4.0, {'kl': 2.0, 'loss': 1 / 3})
  # 3000 + 6000 tokens in 6 s; 2 updates in 6 s, 17 updates left
  assert stream.getvalue() == (
      'ppo 31/50  kl=0.25\n'
      'ppo 33/50  1.50k tokens/s  00:51 left  kl=2  loss=0.3333\n'
  )


def test_the_last_update_is_always_shown():
  clock, stream = _Clock(), io.StringIO()
  progress = Progress('sft', 2, seconds=1e6, stream=stream, clock=clock)
  progress.update(1, 10, 5.0)
  progress.update(2, 7260 * 950, 7260.0)
  assert stream.getvalue() == 'sft 1/2  \nsft 2/2  950 tokens/s  00:00 left\n'


def test_time_left_has_hours_and_large_rates_have_units():
  clock, stream = _Clock(), io.StringIO()
  progress = Progress('sft', 3724, seconds=0.0, stream=stream, clock=clock)
  progress.update(1, 0, 9.0)
  progress.update(2, 4_567_000, 1.0)  # 3722 s = 1 h 2 min 2 s
  assert '4.57M tokens/s  1:02:02 left' in stream.getvalue()


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes():
  stream = _Terminal()
  with Progress('ppo', 50, 30, stream=stream) as progress:
    progress.update(31, 10, 1.0, {'kl': 0.25})
    progress.message('a table')
  text = stream.getvalue()
  assert 'ppo 30/50' in text
  assert 'ppo 31/50' in text and 'kl=0.25' in text
  assert 'a table\n' in text


@pytest.mark.parametrize(
    'text, want',
    [
        ('a\nb\r\nc\td', 'a⏎b⏎c d'),
        ('\x1b[31mred\x1b[0m', 'red'),
        ('\x1b]0;title\x07x\x1b]8;;http://e\x1b\\link', 'xlink'),
        ('\x9b2Jx\x1bcy', 'xy'),
        ('a\x00b\x07c\u202ed\u200be\ud800f', 'abcdef'),
        ('p\u2028q', 'p⏎q'),
        ('häß 猫', 'häß 猫'),
    ],
)
def test_one_line_keeps_text_and_drops_what_moves_the_cursor(text, want):
  assert one_line(text) == want


def test_the_table_is_cut_to_width_and_aligned():
  table = samples_table(
      ['0123456789abcdef', 'Hi'],
      ['one\ntwo three four', '\x1b[2J'],
      {'score': np.float32([1.5, -10.25]).tolist(), 'length': [17, 0]},
      width=40,
  )
  # score and length take 7 + 2 and 6 + 2; (40 - 17 - 2) // 2 = 10 each
  assert table.split('\n') == [
      'prompt      response      score  length',
      '…789abcdef  one⏎two t…    1.500      17',
      'Hi                      -10.250       0',
  ]
  with pytest.raises(ValueError, match="'response': 1"):
    samples_table(['a', 'b'], ['c'], {'score': [1.0, 2.0]})
