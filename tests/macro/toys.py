"""A toy parser, and the rule of the host that asks it."""

import pathlib
import sys
from typing import Any

import numpy as np

from ma_rlhf_jax.macro import host
from tests import tiny

SETTINGS = {
    'termination': 'parsing',
    'parser': '',
    'parse_cutoff': 4,
    'parse_fallback': 'fixed',
    'parse_workers': 0,
    'ngram': 2,
}
# ids 3, 4, 5, ... are a, b, c, ...; 1 is EOS, without characters.
ABCD = [3, 4, 5, 6, 1]
DCBA = [6, 5, 4, 3, 1]

# `count` keeps a list of what it was asked.
TOY = """
import json, os, sys, time
asked = []

def tree(text):
  middle = len(text) // 2
  part = lambda x: '(N ' + ' '.join(x) + ')'
  return f'(S {part(text[:middle])} {part(text[middle:])} (X))'

def count(texts):
  asked.append(list(texts))
  return [[tree(text)] for text in texts]

def raises(texts):
  if any('d' == text[0] for text in texts):
    raise ArithmeticError('not today')
  return count(texts)

def hangs(texts):
  asked.append(list(texts))
  if any('d' == text[0] for text in texts):
    time.sleep(100)
  return [[tree(text)] for text in texts]

def dies(texts):
  if any('d' == text[0] for text in texts):
    os._exit(3)
  return count(texts)

def short(texts):
  return count(texts)[1:]

def strings(texts):
  return [tree(text) for text in texts]

def nothing(texts):
  return None

not_callable = 3

if __name__ == '__main__':
  print('hello', flush=True)
  for line in sys.stdin:
    text = json.loads(line)['text']
    print('noise', flush=True)
    print(json.dumps({'trees': globals()[sys.argv[1]]([text])[0]}), flush=True)
"""


def termination_of(**fields: Any) -> host.HostTermination:
  settings = host.HostSettings(**SETTINGS | fields)
  return host.HostTermination(settings, tiny.Tokenizer())


def told(counts: dict[str, np.ndarray]) -> dict[str, float]:
  """The metrics of a batch."""
  return {name: float(x) for name, x in host.metrics(counts).items()}


def batch(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """Rows with a column of padding, and a pad id that means something else."""
  width = max(map(len, rows)) + 1
  tokens = np.full((len(rows), width), 9, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for index, row in enumerate(rows):
    tokens[index, : len(row)] = row
    mask[index, : len(row)] = True
  return tokens, mask


def ones(starts: np.ndarray) -> list[list[int]]:
  return starts.astype(int).tolist()


def command(toy: pathlib.Path, function: str) -> str:
  """`macro.parser` that runs a function of the module `toy`."""
  return f'command: {sys.executable} {toy} {function}'


# Parsers that talk; MODE says what is printed for each text.
_TALKER = """
import json, os, subprocess, sys, time
print(json.dumps({'event': 'loaded'}), flush=True)
for line in sys.stdin:
  text = json.loads(line)['text']
  tree = f'(S (N {text[:1]}) (N {text[1:]}))'
  answer = json.dumps({'trees': [tree]})
  print(json.dumps({'progress': 1}), flush=True)
  MODE
"""


def talker(toy: pathlib.Path, mode: str) -> str:
  """`macro.parser` of one that talks."""
  script = toy.with_name('talker.py')
  script.write_text(_TALKER.replace('MODE', mode))
  return f'command: {sys.executable} {script}'
