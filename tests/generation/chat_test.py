"""A conversation line by line, with a terminal of lists."""

from collections.abc import Callable, Iterator

from ma_rlhf_jax.generation import chat
from ma_rlhf_jax.generation.chat import Conversation


class _Talk:
  """Runs `chat` on given lines and keeps all that was shown."""

  def __init__(
      self,
      *lines: str,
      answer: Callable[[str], Iterator[str]] | None = None,
      limit: int = 1000,
      label: str = '',
  ):
    self.prompts: list[str] = []
    self.shown: list[str] = []
    self.notes: list[str] = []
    feed = iter(lines)
    terminal = chat.Terminal(
        lambda: next(feed, None), self.shown.append, self.notes.append, label
    )

    def said(prompt: str) -> Iterator[str]:
      self.prompts.append(prompt)
      return answer(prompt) if answer else iter([' I ', f'{len(prompt)}'])

    fits = lambda text: len(text) <= limit
    self.left = chat.chat(terminal, said, fits)
    self.unread = list(feed)

  @property
  def text(self) -> str:
    return ''.join(self.shown)


def test_the_format_of_hh_by_hand():
  said = Conversation().add('Hi!', ' Hello.').add('Who?', ' Me.')
  assert said.prompt('Why?') == (
      '\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: Me.'
      '\n\nHuman: Why?\n\nAssistant:'
  )


def test_each_turn_sees_those_before():
  talk = _Talk('a\n', 'b\n')
  first = '\n\nHuman: a\n\nAssistant:'  # 22 characters
  assert talk.prompts == [
      first,
      f'{first} I 22\n\nHuman: b\n\nAssistant:',
  ]
  assert talk.text == 'I 22\nI 49\n'  # without the blank in front
  assert talk.left.turns == (('a', ' I 22'), ('b', ' I 49'))


def test_reset_forgets_and_quit_ends():
  talk = _Talk('a', '/reset', 'a', '/quit', 'b')
  assert talk.prompts == ['\n\nHuman: a\n\nAssistant:'] * 2
  assert talk.notes == ['forgotten'] and talk.unread == ['b']


def test_blank_lines_and_unknown_commands_ask_nothing():
  talk = _Talk('', '  \n', '/rest\n', '/usr/bin is what?')
  assert len(talk.prompts) == 1 and '/usr/bin is what?' in talk.prompts[0]
  assert talk.notes == [f'there is no /rest; {chat.HELP}']


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said():
  def answer(prompt: str) -> Iterator[str]:
    yield ' As'
    if len(prompt) == 22:
      raise KeyboardInterrupt
    yield ' I said.'

  talk = _Talk('a', 'b', answer=answer)
  assert talk.text == 'As\nAs I said.\n' and talk.notes == ['stopped']
  assert talk.left.turns == (('a', ' As'), ('b', ' As I said.'))


def test_a_turn_without_an_answer_is_forgotten():
  def answer(prompt: str) -> Iterator[str]:
    if prompt.endswith('Human: a\n\nAssistant:'):
      raise KeyboardInterrupt
    yield ' I.'

  talk = _Talk('a', 'b', answer=answer)
  assert talk.prompts[1] == '\n\nHuman: b\n\nAssistant:'


def test_the_oldest_turns_are_forgotten_when_they_no_longer_fit():
  # A turn of 27 characters, and a question of 22.
  talk = _Talk('a', 'b', 'c', 'd', limit=76)
  assert talk.prompts[2].count('Human:') == 3
  assert talk.prompts[3].count('Human:') == 3
  assert 'Human: a' not in talk.prompts[3] and 'Human: b' in talk.prompts[3]
  assert talk.notes == ['too long by now: the first 1 turns are forgotten']


def test_a_line_that_never_fits_is_not_sent():
  talk = _Talk('a' * 90, 'b', limit=50)
  assert len(talk.prompts) == 1 and 'Human: b' in talk.prompts[0]
  assert talk.notes == ['this is longer than --max_prompt_len; say it shorter']


def test_controls_are_not_shown_but_remembered():
  talk = _Talk('a', answer=lambda prompt: iter([' \x1b[2J', 'x\ty\n\x07z']))
  assert talk.text == '[2Jx\ty\nz\n'
  assert talk.left.turns == (('a', ' \x1b[2Jx\ty\n\x07z'),)


def test_an_answer_has_a_label_where_the_terminal_wants_one():
  assert _Talk('a', label='Assistant: ').text == 'Assistant: I 22\n'
