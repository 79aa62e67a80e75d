"""Parses texts into constituency trees: JSON lines in and out.

A row {"text": ...} comes back with "trees": one bracketed string for each
sentence, null where the parser failed; its other fields stay. What comes out
serves as macro.parser=trees.jsonl. Rows go out one by one, so it also answers
a run, from an environment of its own, as it imports nothing of this package:

  python3.10 -m venv benepar-env
  benepar-env/bin/pip install benepar spacy 'transformers<4.50' torch
  benepar-env/bin/python -m spacy download en_core_web_md
  benepar-env/bin/python -c "import benepar; benepar.download('benepar_en3')"

A run calls it by this value of --config.macro.parser:

  'command: benepar-env/bin/python ma_rlhf_jax/tools/parse.py'

Any other parser: --parser=module:function, which for a list of texts gives a
list of trees (strings, nltk.Tree or the like, None) for each.

Source: the Berkeley Neural Parser, arXiv 1812.11760, which MA-RLHF uses.

Exit codes: 0 done; 1 an error; 2 a wrong flag; 130 Ctrl-C.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
import importlib
import json
import os
import pathlib
import re
import runpy
import signal
import sys
from typing import Any, TextIO

_EXAMPLES = """
examples:
  python ma_rlhf_jax/tools/parse.py < responses.jsonl > trees.jsonl
  python -m ma_rlhf_jax.tools.parse --parser=my_module:parse < in.jsonl
"""
# Beyond that an object is no tree; one that holds itself has no end.
_MAX_PARTS = 200_000

Parser = Callable[[list[str]], list[list[Any]]]


def brackets(tree: Any) -> str | None:
  """`(S (NP (DT The) (NN cat)))` of an object like nltk.Tree.

  Strings stay as they are; what is no tree comes out as None.
  """
  if isinstance(tree, str):
    return tree
  end, parts, stack = object(), [], [iter([tree])]
  while stack and len(parts) < _MAX_PARTS:
    child = next(stack[-1], end)
    if child is end:
      stack.pop()
      parts += ')' if stack else ''
    elif isinstance(child, str):
      word = ''.join(child.split())
      parts.append(word.replace('(', '-LRB-').replace(')', '-RRB-'))
    elif hasattr(child, 'label'):
      parts.append('(' + re.sub(r'[\s()]+', '_', str(child.label())))
      stack.append(iter(child))
    else:
      return None
  return None if stack else ' '.join(parts).replace(' )', ')')


def load_function(name: str) -> Parser:
  """The function of `module:function`; modules of this folder count."""
  module, _, function = name.partition(':')
  sys.path.insert(0, os.getcwd())
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    sys.exit(
        f'error: --parser={name}: {error}; give module:function of a module in '
        f'{os.getcwd()} or in this environment ({sys.prefix})'
    )


def load_benepar(model: str, spacy_model: str) -> Parser:
  """benepar behind spaCy's sentences; a sentence that fails is None."""
  try:
    import benepar  # noqa: F401  (registers the pipe)
    import spacy
  except ImportError as error:
    sys.exit(
        f'error: {error}; run it in the environment that the first lines of '
        f'{__file__} make, or give --parser=module:function'
    )
  try:
    nlp = spacy.load(spacy_model)
    parse = nlp.add_pipe('benepar', config={'model': model})
  except (OSError, LookupError, ValueError) as error:
    said = ' '.join(str(error).split())[:300]
    sys.exit(
        f'error: --model={model} or --spacy={spacy_model} cannot be loaded '
        f'({said}); the first lines of {__file__} say how to fetch them'
    )

  def sentence(span: Any) -> str | None:
    try:
      doc = parse(span.as_doc())
      return next(iter(doc.sents))._.parse_string
    # Too long a sentence is a ValueError; the next one may well be fine.
    except Exception as error:
      print(f'not parsed: {span.text[:80]!r}: {error!r}', file=sys.stderr)
      return None

  def line(text: str) -> list[str | None]:
    with nlp.select_pipes(disable=['benepar']):
      doc = nlp(text)
    try:
      return [span._.parse_string for span in parse(doc).sents]
    except Exception:  # one sentence spoils them all
      return [sentence(span) for span in doc.sents]

  # A blank of its own would be a word to benepar, which it cannot parse.
  def parse_text(text: str) -> list[str | None]:
    lines = [' '.join(part.split()) for part in text.splitlines()]
    return [tree for part in lines if part for tree in line(part)]

  return lambda texts: [parse_text(text) for text in texts]


def answer(parser: Parser, text: str) -> dict[str, Any]:
  """The trees of one text; `error` beside them where there are none."""
  try:
    trees = parser([text])
    if len(trees) != 1 or isinstance(trees[0], str):
      raise ValueError('the parser must give a list of trees for each text')
    return {'trees': [brackets(tree) for tree in trees[0]]}
  # It is the user's parser, and the other texts are not at fault.
  except Exception as error:
    print(f'not parsed: {text[:80]!r}: {error!r}', file=sys.stderr)
    return {'trees': [None], 'error': repr(error)}


def rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
  """The rows of a JSON lines file; SystemExit names a line that is none."""
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      sys.exit(f'line {number} of the input is not JSON: {error}')
    if not isinstance(row, dict) or not isinstance(row.get('text'), str):
      sys.exit(f'line {number} of the input must be {{"text": "..."}}')
    yield row


def run(parser: Parser, lines: Iterable[str], out: TextIO) -> None:
  """Answers each row at once."""
  for row in rows(lines):
    trees = answer(parser, row['text'])
    print(json.dumps({**row, **trees}), file=out, flush=True)


def _end_on_ctrl_c(*unused: Any) -> None:
  os.write(2, b'interrupted\n')
  os._exit(130)  # no traceback, and no thread of a parser that goes on


class _Version(argparse.Action):
  """Prints the version, which is read only then: the file may stand alone."""

  def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
    package = pathlib.Path(__file__).resolve().parents[1] / '__init__.py'
    version = runpy.run_path(str(package))['__version__']
    print(f'ma_rlhf_jax {version}')
    parser.exit()


def _flags() -> argparse.ArgumentParser:
  flags = argparse.ArgumentParser(
      prog='python -m ma_rlhf_jax.tools.parse',
      usage='%(prog)s [flags] < INPUT > OUTPUT',
      description=__doc__,
      epilog=_EXAMPLES,
      formatter_class=argparse.RawTextHelpFormatter,
      add_help=False,
  )
  add = flags.add_argument_group('flags').add_argument
  add(
      '--model',
      metavar='NAME',
      default='benepar_en3',
      help='The model of benepar. Default: %(default)s.',
  )
  add(
      '--spacy',
      metavar='NAME',
      default='en_core_web_md',
      help='The spaCy model that splits texts into sentences.\n'
      'Default: %(default)s.',
  )
  add(
      '--parser',
      metavar='M:F',
      default='',
      help='The function F of module M parses instead of benepar.\n'
      'Default: none, benepar.',
  )
  add('-h', '--help', action='help', help='This text.')
  add('--version', action=_Version, nargs=0, help='The version of the package.')
  return flags


def main() -> None:
  """Reads the flags and loads the parser."""
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, _end_on_ctrl_c)
  args = _flags().parse_args()
  # Run as a file, the modules beside this one would hide others by their name.
  here = os.path.dirname(os.path.abspath(__file__))
  sys.path[:] = [p for p in sys.path if os.path.abspath(p or '.') != here]
  # Parsers like to talk: only answers go where they are expected.
  out = os.fdopen(os.dup(sys.stdout.fileno()), 'w', encoding='utf-8')
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  sys.stdin.reconfigure(encoding='utf-8')
  if args.parser:
    parser = load_function(args.parser)
  else:
    parser = load_benepar(args.model, args.spacy)
  run(parser, sys.stdin, out)


if __name__ == '__main__':
  main()
