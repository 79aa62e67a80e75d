"""The tool that shows macro actions, run as a user runs it."""

from collections.abc import Iterator
import contextlib
import gzip
import io
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

from absl import flags
from absl.testing import flagsaver
import pytest

from ma_rlhf_jax import recipe_flag
from ma_rlhf_jax.tools import explore
from tests import products

_ROOT = pathlib.Path(__file__).parents[2]
_TINY = str(_ROOT / 'configs' / 'tiny.py')


class _Ran(NamedTuple):
  """What a command ended with."""

  returncode: int
  stdout: str
  stderr: str


@contextlib.contextmanager
def _own_flags() -> Iterator[None]:
  """Flags belong to one command line, those of fields too."""
  with flagsaver.flagsaver():
    yield
  for name in list(flags.FLAGS):
    if name.startswith(('config.', 'other.')):
      delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


def _run(*arguments: str) -> _Ran:
  """The command in this process, which has imported everything."""
  out = io.StringIO()
  with _own_flags(), contextlib.redirect_stdout(out):
    try:
      explore.main(recipe_flag.parse(['explore', *arguments]))
    except SystemExit as stopped:
      return _Ran(1, out.getvalue(), str(stopped.code))
  return _Ran(0, out.getvalue(), '')


@pytest.mark.slow
def test_the_command_prints_and_ends() -> None:
  command = [sys.executable, '-m', 'ma_rlhf_jax.tools.explore', '--text=a b']
  ran = subprocess.run(
      command, capture_output=True, text=True, cwd=_ROOT, check=False
  )
  assert ran.returncode == 0 and 'decisions' in ran.stdout, ran.stderr


@pytest.mark.slow
def test_advantages_under_two_rules_stand_side_by_side(tmp_path: pathlib.Path):
  page = tmp_path / 'page.html'
  ran = _run(
      f'--config={_TINY}:ngram=3',
      '--config.ppo.gae_lambda=0.5',
      f'--other={_TINY}:one_macro',
      '--text=a b c d <script>x</script>',
      '--score=2',
      '--value=1',
      f'--html={page}',
  )
  assert ran.returncode == 0, ran.stderr
  assert 'A: ours; macro.termination=fixed with macro.ngram=3' in ran.stdout
  assert '1 decisions, 1.0 per response' in ran.stdout
  table = [
      line.split()[-2:]
      for line in ran.stdout.splitlines()
      if line.startswith('    ') and line.rstrip()[-1:].isdigit()
  ]
  table = [pair for pair in table if pair[0][0] in '+-']
  # B: 2 - 1. A from the end: 2 - 1, then 0 + .5 * 1, .25, ... halved each.
  assert {b for _, b in table} == {'+1.0000'}
  a = [float(x) for x, _ in table]
  assert a[-1] == 1.0 and a[0] < 1.0
  for t in range(len(a)):
    later = (len(a) - 1) // 3 - t // 3
    assert a[t] == pytest.approx(0.5**later, abs=1e-4)
  html = page.read_text()
  assert '<script>' not in html and '&lt;' in html
  assert 'http' not in html and len(html) < 100_000


def test_rows_of_a_file_with_their_own_numbers(tmp_path: pathlib.Path):
  # Letters; the reference finds the fourth and the last unlikely.
  rows = tmp_path / 'rows.jsonl.gz'
  nll = [1.0, 0.5, 0.5, 3.0, 1.0, 4.0]
  row = {'answer': '1\n2\n3', 'ref_logprobs': [-x for x in nll], 'score': 5}
  with gzip.open(rows, 'wt') as file:
    file.write(json.dumps(row) + '\n')
  ran = _run(
      f'--config={_TINY}:termination=ppl',
      f'--input={rows}',
      '--column=answer',
      '--color=never',
  )
  assert ran.returncode == 0, ran.stderr
  assert 'response 1, score 5 (from the row), clipped to 2.5\n' in ran.stdout
  assert '  A [1⏎2][⏎3][<eos>]' in ran.stdout


def test_rules_of_the_host_and_colours():
  ran = _run(
      f'--config={_TINY}:termination=python',
      '--text=x = 1\nif x:\n  y = 2',
      '--color=always',
  )
  assert ran.returncode == 0, ran.stderr
  assert '3 decisions' in ran.stdout and '\x1b[30;44m' in ran.stdout


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ([], "nothing to show; give --text='...'"),
        (
            [f'--config={_TINY}:termination=ppl', '--text=a'],
            "macro.termination='ppl' asks for probabilities, and row 1 has no",
        ),
        (
            ['--text=a', '--config.macro.reward=mean'],
            "--config: critic.target='token' aims at summed rewards",
        ),
        (
            ['--text=a', '--config=none.py'],
            '--config=none.py: there is no such',
        ),
        (['--input=none.jsonl'], 'none.jsonl'),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments: list[str], words: str):
  ran = _run(*arguments)
  assert ran.returncode == 1
  assert words in ran.stderr and 'Traceback' not in ran.stderr


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('{"text": ', 'line 2 is no JSON'),
        ('{"prompt": "a"}', 'line 2 has no text in response, text, chosen'),
        ('{"text": "a", "values": [1]}', 'row 2: values has 1 numbers'),
        ('{"text": "a", "values": 3}', 'row 2: values must be a list'),
        ('{"text": "a", "score": "high"}', "line 2: score is 'high'; it must"),
        ('{"text": "a", "prompt": 5}', 'line 2: prompt is 5, not text'),
        ('{"text": "\\ud83d"}', 'line 2: text holds half a character'),
    ],
)
def test_a_bad_row_is_named(tmp_path: pathlib.Path, line: str, words: str):
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('{"text": "fine"}\n' + line + '\n')
  ran = _run(f'--input={rows}')
  assert ran.returncode == 1
  assert words in ran.stderr and 'Traceback' not in ran.stderr


def test_a_file_that_is_cut_is_named(tmp_path: pathlib.Path):
  rows = tmp_path / 'rows.jsonl.gz'
  rows.write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-20])
  ran = _run(f'--input={rows}')
  assert ran.returncode == 1 and 'rows.jsonl.gz is cut' in ran.stderr


def test_blank_lines_are_no_rows(tmp_path: pathlib.Path):
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('\n{"text": "a b"}\n\n')
  assert _run(f'--input={rows}').returncode == 0


def test_a_recipe_that_is_no_python_is_named():
  ran = _run('--text=a', f'--config={_ROOT / "README.md"}')
  assert ran.returncode == 1 and 'README.md, line' in ran.stderr
  assert 'SyntaxError' in ran.stderr


@pytest.mark.slow
def test_the_fields_of_rule_a_hold_for_rule_b_too():
  fields = ['--config.ppo.gae_lambda=0.5', '--text=a b c d e f g']
  ran = _run('--config', f'{_TINY}:authors', *fields)
  assert ran.returncode == 0, ran.stderr
  b = next(x for x in ran.stdout.splitlines() if x.startswith('B: '))
  assert 'authors' in b and 'macro.ngram=1' in b


def test_a_terminal_is_told_no_escapes():
  ran = _run('--text=a \x1b[31mred\r\x07', '--color=never')
  assert ran.returncode == 0 and not set('\x1b\r\x07') & set(ran.stdout)


def test_sentences_without_a_tree_are_counted(tmp_path: pathlib.Path):
  trees = tmp_path / 'trees.jsonl'
  row = {
      'text': 'The cat sat. It purred.',
      'trees': ['(S (X The) (X cat', None],
  }
  trees.write_text(json.dumps(row) + '\n')
  ran = _run(
      f'--config={_TINY}:termination=parsing',
      f'--config.macro.parser={trees}',
      f'--text={row["text"]}',
  )
  assert ran.returncode == 0, ran.stderr
  assert 'sentences without a usable tree, segmented by' in ran.stdout


@pytest.mark.slow
def test_a_workdir_stands_for_its_policy(tmp_path: pathlib.Path):
  made = products.make(tmp_path)
  ran = _run(
      f'--config={_TINY}:termination=ppl',
      f'--model={made.workdir}',
      '--text=My boss',
  )
  assert ran.returncode == 0, ran.stderr
  assert 'tokenizer: trained' not in ran.stdout and 'decisions' in ran.stdout
