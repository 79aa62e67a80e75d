"""Generates responses to a prompt, to a file, or in a chat.

With --prompt the response is printed. With --input and --output the rows of a
file are answered, and their other fields kept. With neither a conversation in
the format of HH is read from the standard input.

A prompt is used as it stands, after BOS. For a model trained on HH write
$'\\n\\nHuman: Hi\\n\\nAssistant:'.

Rows that are written hold `prompt`, `response`, `response_ids` (with EOS where
it ended by itself), `num_tokens` (their number) and `logprob` (nats, the sum
over these ids under the model itself, at temperature 1 and without filters,
whatever they were drawn with). With --reward_model each is scored; of
--num_samples the one with the best `score` is written, and `scores` holds all.
Without it there is one row a sample, numbered by `sample`.

A response depends on --seed, the tokens of its prompt, how often that prompt
stood before, and the number of the sample; not on its neighbours, their order
or --batch_size.

Exit codes: 0 done; 1 an error; 130 Ctrl-C.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import sys
import time

from ma_rlhf_jax import interrupts
from ma_rlhf_jax.commands import command, verbs

if __name__ == '__main__':  # before the imports below, which take seconds
  interrupts.end_on_ctrl_c()
  command.answer(verbs.GENERATE)

from absl import app, flags
import jax

from ma_rlhf_jax.commands import absl_flags
from ma_rlhf_jax.data import outputs
from ma_rlhf_jax.data import prompts as prompts_lib
from ma_rlhf_jax.generation import batching, chat, records
from ma_rlhf_jax.generation import session as session_lib
from ma_rlhf_jax.generation.request import Request
from ma_rlhf_jax.training import checkpoint, console


def request_of(values: flags.FlagValues) -> Request:
  """The request that parsed flags make."""
  fields = [field.name for field in dataclasses.fields(Request)]
  return Request(**{name: values[name].value for name in fields})


def _say(text: str) -> None:
  if text:
    print(text, file=sys.stderr, flush=True)


def _find(request: Request) -> session_lib.Found:
  """Checks the models that a request names, and says what they are."""
  found = session_lib.find(request)
  for model in found.models:
    _say(model.describe())
  return found


def answer_file(request: Request) -> None:
  """JSONL to JSONL."""
  given, numbers = prompts_lib.read_rows(request.input)
  outputs.check(request.output, request.overwrite, request.input)
  found = _find(request)
  texts = [row['prompt'] for row in given]
  names = [f'line {number}' for number in numbers]
  prompts = session_lib.encode(request, found.policy.tokenizer, texts, names)
  if lost := records.replaced(given):
    _say(f'note: {", ".join(lost)} of the input are not kept')
  with contextlib.ExitStack() as stack:
    output = outputs.Output(request.output, request.overwrite)
    stack.callback(lambda: _say(output.abandon()))
    stack.enter_context(interrupts.at_end(output.abandon))
    with session_lib.opened(request, found) as session:
      _write_all(session, given, prompts, output)
    with interrupts.held():
      output.commit()
      stack.pop_all()
  _say(f'written: {request.output}')


def _write_all(
    session: session_lib.Session,
    given: Sequence[dict],
    prompts: Sequence[Sequence[int]],
    output: outputs.Output,
) -> None:
  collector = records.Collector(session.request.num_samples)
  with console.Progress('rows', len(given)) as progress:
    last = time.monotonic()
    for batch in session.respond(prompts):
      for responses in collector.add(batch):
        row = responses[0].row
        output.add(row, session.rows(given[row], responses))
      output.flush()
      now = time.monotonic()
      tokens = sum(len(response.ids) for response in batch)
      progress.update(len(output), tokens, now - last)
      last = now


def answer_one(request: Request) -> None:
  """Prints the response to --prompt, or each of several."""
  found = _find(request)
  ids = session_lib.encode(
      request, found.policy.tokenizer, [request.prompt], ['the prompt']
  )
  collector = records.Collector(request.num_samples)
  with session_lib.opened(request, found) as session:
    for batch in session.respond(ids):
      for responses in collector.add(batch):
        _show(session.rows({}, responses))


def _show(rows: Sequence[dict]) -> None:
  """Texts to the standard output; numbers beside them where there is one."""
  for row in rows:
    about = f'{row["num_tokens"]} tokens, {row["logprob"]:.3f} nats'
    if 'score' in row:
      about += f', score {row["score"]:.3f}'
    if len(rows) > 1:
      print(f'--- sample {row["sample"]}: {about}')
    text = row['response']
    print(chat.printable(text) if sys.stdout.isatty() else text, flush=True)
    if len(rows) == 1:
      _say(f'({about})')


def _terminal() -> chat.Terminal:
  """The standard streams; a pipe gets the answers alone."""
  for stream in (sys.stdin, sys.stdout):
    stream.reconfigure(errors='replace')
  asked = sys.stdin.isatty()

  def read() -> str | None:
    while asked:
      try:
        with interrupts.raising():
          return input('Human: ')
      except EOFError:
        print()
        return None
      except KeyboardInterrupt:
        print()
        _say(chat.HELP)
    return sys.stdin.readline() or None

  def write(text: str) -> None:
    print(text, end='', flush=True)

  if asked:
    import readline  # noqa: F401  (line editing and history)
  return chat.Terminal(read, write, _say, 'Assistant: ' if asked else '')


def _until_ctrl_c(pieces: Iterator[str]) -> Iterator[str]:
  """An answer that Ctrl-C stops before its next piece."""
  with interrupts.noted() as stopped:
    for piece in pieces:
      if stopped():
        raise KeyboardInterrupt
      yield piece


def converse(request: Request, terminal: chat.Terminal) -> None:
  """A conversation on a terminal."""
  with session_lib.opened(request, _find(request)) as session:
    compiled = set()

    def answer(text: str) -> Iterator[str]:
      width = batching.width(len(session.prompt_ids(text)))
      if width not in compiled:
        terminal.note(f'(compiling for prompts of up to {width} tokens)')
        compiled.add(width)
      return _until_ctrl_c(session.answer(text))

    terminal.note(f'a conversation in the format of HH: {chat.HELP}')
    chat.chat(terminal, answer, session.fits)


def run(request: Request) -> None:
  """Does what a request asks for; raises what a user can mend."""
  request.check()
  if request.input:
    answer_file(request)
  elif request.prompt is not None:
    answer_one(request)
  else:
    converse(request, _terminal())


def main(argv: list[str]) -> None:
  """Runs the request that the flags make."""
  checkpoint.quiet_logging()
  request = request_of(flags.FLAGS)
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected arguments: {argv[1:]}')
    run(request)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    sys.exit(
        f'error: the devices have too little memory for --batch_size='
        f'{request.batch_size} with --max_new_tokens={request.max_new_tokens}; '
        f'make these smaller, or --tensor larger: {str(error).splitlines()[0]}'
    )


if __name__ == '__main__':
  absl_flags.define(verbs.GENERATE.flags)
  app.run(main, flags_parser=absl_flags.parse)
