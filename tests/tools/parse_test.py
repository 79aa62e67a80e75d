"""The parser that runs in an environment of its own."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from ma_rlhf_jax import __version__
from ma_rlhf_jax.tools import parse
from tests import helped

_FILE = pathlib.Path(parse.__file__)

# Words in twos; says things on the way, and cannot read `bad`.
TOY = """
import os

class Node:
  def __init__(self, label, children):
    self._label, self._children = label, children
  def label(self):
    return self._label
  def __iter__(self):
    return iter(self._children)

def function(texts):
  print('parsing', len(texts))
  os.system('echo from C')
  return [parse_text(text) for text in texts]

def parse_text(text):
  if 'bad' in text:
    raise ArithmeticError('cannot read this')
  if 'none' in text:
    return [None]
  return [Node('S', [Node('T (', [w]) for w in text.split()]), '(S x)', 3]

def short(texts):
  return []
"""

# What benepar and spaCy have of what is used of them.
SPACY = """
class Doc:
  def __init__(self, text):
    self.text = text
    self._ = self
    self.parsed = False
  @property
  def sents(self):
    parts = [p + '.' for p in self.text.split('.') if p.strip()]
    return [Span(part, self) for part in parts]

class Span:
  def __init__(self, text, doc):
    self.text, self.doc = text.strip(), doc
    self._ = self
  def as_doc(self):
    return Doc(self.text)
  @property
  def parse_string(self):
    assert self.doc.parsed
    return '(S ' + self.text + ')'

class Language:
  def __init__(self):
    self.enabled = True
  def add_pipe(self, name, config):
    assert (name, config) == ('benepar', {'model': 'tiny'})
    return parse
  def select_pipes(self, disable):
    import contextlib
    assert disable == ['benepar']
    @contextlib.contextmanager
    def off():
      self.enabled = False
      yield
      self.enabled = True
    return off()
  def __call__(self, text):
    assert not self.enabled and text == ' '.join(text.split())
    return Doc(text)

def parse(doc):
  if 'long' in doc.text:
    raise ValueError('too long a sentence')
  doc.parsed = True
  return doc

def load(name):
  assert name == 'small'
  return Language()
"""


def _run(
    folder: pathlib.Path, rows: list[str], *flags: str, spacy: bool = False
) -> subprocess.CompletedProcess[str]:
  (folder / 'toy.py').write_text(TOY)
  (folder / 'spacy.py').write_text(SPACY)
  (folder / 'benepar.py').write_text('')
  return subprocess.run(
      [sys.executable, str(_FILE), *flags],
      input='\n'.join(rows),
      capture_output=True,
      text=True,
      cwd=folder,
      env={**os.environ, 'PYTHONPATH': str(folder) if spacy else ''},
      timeout=60,
  )


def _lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines()]


def test_rows_come_back_with_trees(tmp_path: pathlib.Path) -> None:
  rows = ['{"id": 7, "text": "a (b) é"}', '', '{"text": "none"}']
  done = _run(tmp_path, rows, '--parser=toy:function')
  assert _lines(done) == [
      {
          'id': 7,
          'text': 'a (b) é',
          'trees': ['(S (T_ a) (T_ -LRB-b-RRB-) (T_ é))', '(S x)', None],
      },
      {'text': 'none', 'trees': [None]},
  ]
  assert 'from C' in done.stderr


@pytest.mark.parametrize(
    'function,error', [('function', 'ArithmeticError'), ('short', 'ValueError')]
)
def test_a_parser_that_fails_is_told_of(
    function: str, error: str, tmp_path: pathlib.Path
) -> None:
  done = _run(tmp_path, ['{"text": "bad"}'] * 2, f'--parser=toy:{function}')
  lines = _lines(done)
  assert [line['trees'] for line in lines] == [[None], [None]]
  assert all(error in line['error'] for line in lines)


@pytest.mark.parametrize('row', ['{"text": 3}', '{"text"', '[]'])
def test_a_row_that_is_none_is_named(row: str, tmp_path: pathlib.Path) -> None:
  rows = ['{"text": "a"}', row]
  done = _run(tmp_path, rows, '--parser=toy:function')
  assert done.returncode != 0
  assert 'line 2 of the input' in done.stderr


def test_benepar_parses_line_by_line(tmp_path: pathlib.Path) -> None:
  text = 'A  b. C d.\n\n  Too long. E f.'
  rows = [json.dumps({'text': text})]
  done = _run(tmp_path, rows, '--model=tiny', '--spacy=small', spacy=True)
  (line,) = _lines(done)
  assert line['trees'] == ['(S A b.)', '(S C d.)', None, '(S E f.)']
  assert "not parsed: 'Too long.'" in done.stderr


def test_a_tree_without_end_is_none() -> None:
  class Endless(list):

    def label(self) -> str:
      return 'S'

  tree = Endless()
  tree.append(tree)
  assert parse.brackets(tree) is None
  assert parse.brackets(Endless(['a', Endless(['b'])])) == '(S a (S b))'


def test_help_and_version_are_on_the_standard_output() -> None:
  text = helped.run('ma_rlhf_jax.tools.parse', '-h')
  helped.check_text(text)
  for name in ('model', 'spacy', 'parser', 'help', 'version'):
    assert f'--{name}' in text
  done = subprocess.run(
      [sys.executable, str(_FILE), '--version'], capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout == f'ma_rlhf_jax {__version__}\n'


def test_it_imports_nothing_but_the_standard_library() -> None:
  # As a plain file, where this package is not installed.
  code = (
      'import runpy, sys\n'
      f'runpy.run_path({str(_FILE)!r})\n'
      'third = {m.partition(".")[0] for m in sys.modules}\n'
      'print(sorted(third - sys.stdlib_module_names - {"__main__"}))'
  )
  done = subprocess.run(
      [sys.executable, '-S', '-E', '-c', code], capture_output=True, text=True
  )
  assert done.stdout.strip() == '[]', done.stderr


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--parser=nowhere:function'], '--parser=nowhere:function: No module'),
        (['--parser=toy:nothing'], "has no attribute 'nothing'; give module:"),
        (['--parser='], "No module named 'benepar'; run it in the environment"),
        (
            ['--spacy=nothing'],
            'or --spacy=nothing cannot be loaded (no nothing)',
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    tmp_path: pathlib.Path, arguments: list[str], words: str
) -> None:
  (tmp_path / 'toy.py').write_text('')
  if '--spacy=nothing' in arguments:
    (tmp_path / 'benepar.py').write_text('')
    load = "def load(name):\n  raise OSError('no\\nnothing')\n"
    (tmp_path / 'spacy.py').write_text(load)
  elif importlib.util.find_spec('benepar') and arguments == ['--parser=']:
    pytest.skip('benepar is installed')
  done = subprocess.run(
      [sys.executable, parse.__file__, *arguments],
      cwd=tmp_path,
      env={**os.environ, 'PYTHONPATH': str(tmp_path)},
      input='',
      capture_output=True,
      text=True,
      timeout=60,
  )
  assert done.returncode == 1 and done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and words in line
