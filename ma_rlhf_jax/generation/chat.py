"""A conversation in the format of HH, line by line.

  \\n\\nHuman: Hi!\\n\\nAssistant: Hello.\\n\\nHuman: Who?\\n\\nAssistant:

Everything that a terminal does is handed in, so that a test may stand for it.
"""

from collections.abc import Callable, Iterator
import dataclasses
import re
import unicodedata

HUMAN, ASSISTANT = '\n\nHuman:', '\n\nAssistant:'
HELP = '/reset forgets the conversation, /quit or Ctrl-D ends'


@dataclasses.dataclass(frozen=True)
class Conversation:
  """What was said.

  Attributes:
    turns: (line of the human, text of the assistant, blank in front included).
  """

  turns: tuple[tuple[str, str], ...] = ()

  def prompt(self, line: str) -> str:
    """The text that the model continues where the human says `line`."""
    said = [
        f'{HUMAN} {human}{ASSISTANT}{assistant}'
        for human, assistant in self.turns
    ]
    return ''.join([*said, f'{HUMAN} {line}{ASSISTANT}'])

  def add(self, line: str, answer: str) -> 'Conversation':
    """The conversation with one more turn."""
    return Conversation((*self.turns, (line, answer)))

  def that_fits(
      self, line: str, fits: Callable[[str], bool]
  ) -> 'Conversation | None':
    """The longest end of it whose prompt fits; None where `line` is too long.

    Args:
      line: what the human says next.
      fits: whether the model can read a prompt.
    """
    for first in range(len(self.turns) + 1):
      shorter = Conversation(self.turns[first:])
      if fits(shorter.prompt(line)):
        return shorter
    return None


def printable(text: str) -> str:
  """`text` without controls, which a terminal would obey."""
  return ''.join(
      c for c in text if c in '\n\t' or unicodedata.category(c) != 'Cc'
  )


@dataclasses.dataclass(frozen=True)
class Terminal:
  """Where a conversation takes place.

  Attributes:
    read: the next line of the human without its end; None = there is none.
    write: shows a piece of an answer at once.
    note: shows a line that is no part of the conversation.
    label: is written before each answer.
  """

  read: Callable[[], str | None]
  write: Callable[[str], None]
  note: Callable[[str], None]
  label: str = ''


def _answer(terminal: Terminal, pieces: Iterator[str]) -> str:
  """Shows an answer as it comes, and gives it back; Ctrl-C ends it."""
  said, shown = [], False
  terminal.write(terminal.label)
  try:
    for piece in pieces:
      said.append(piece)
      text = printable(piece)
      if text := text if shown else text.lstrip():
        terminal.write(text)
        shown = True
    terminal.write('\n')
  except KeyboardInterrupt:
    terminal.write('\n')
    terminal.note('stopped')
  return ''.join(said)


def chat(
    terminal: Terminal,
    answer: Callable[[str], Iterator[str]],
    fits: Callable[[str], bool],
) -> Conversation:
  """Talks until the human ends it.

  Args:
    terminal: where.
    answer: the pieces of the answer to a prompt.
    fits: whether the model can read a prompt; where it cannot, the oldest
      turns are forgotten.

  Returns:
    What was said since the last /reset.
  """
  said = Conversation()
  while (line := terminal.read()) is not None:
    line = line.strip()
    if line == '/quit':
      break
    if line == '/reset':
      said = Conversation()
      terminal.note('forgotten')
    elif re.fullmatch(r'/\w+', line):
      terminal.note(f'there is no {line}; {HELP}')
    elif line:
      said = _turn(terminal, said, line, answer, fits)
  return said


def _turn(
    terminal: Terminal,
    said: Conversation,
    line: str,
    answer: Callable[[str], Iterator[str]],
    fits: Callable[[str], bool],
) -> Conversation:
  kept = said.that_fits(line, fits)
  if kept is None:
    terminal.note('this is longer than --max_prompt_len; say it shorter')
    return said
  if forgotten := len(said.turns) - len(kept.turns):
    terminal.note(f'too long by now: the first {forgotten} turns are forgotten')
  text = _answer(terminal, answer(kept.prompt(line)))
  return kept.add(line, text) if text else kept
