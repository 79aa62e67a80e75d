"""The pages say what is so: links, flags, fields, names, commands, examples."""

import ast
from collections.abc import Iterator
import contextlib
import io
import pathlib
import re
import sys

from ml_collections import ConfigDict
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import recipe, switches, validation
from ma_rlhf_jax.commands.command import HELP
from ma_rlhf_jax.macro import termination, text_rules
from ma_rlhf_jax.training import symptoms
from tests import pages

_ROOT, _PACKAGE = pages.ROOT, pages.PACKAGE
_FRONT = _ROOT / 'README.md'
_IDS = [pages.name_of(page) for page in pages.PAGES]
_each_page = pytest.mark.parametrize('page', pages.PAGES, ids=_IDS)
# Commands of others, whose flags are not ours to check.
_FOREIGN = {'pip', 'git', 'vllm', 'curl', 'source', 'hf'}
# Flags of the authors' README that their code does not have.
_ABSENT = {'parsing_cutoff', 'bf16'}
# First words of dotted names of others.
_THEIRS = {'trl', 'DIR', 'failurePolicy'}


@pytest.fixture(scope='module')
def shown(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[pathlib.Path]:
  """A folder with the files that pages show, whose modules can be imported."""
  folder = tmp_path_factory.mktemp('shown')
  for page in pages.PAGES:
    for name, code in pages.files(page.read_text()).items():
      (folder / name).write_text(code)
  # What pages write where any function may stand: `module:function`.
  (folder / 'module.py').write_text('def function(*args):\n  return args\n')
  modules = {path.stem for path in folder.glob('*.py')}
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(folder))
    yield folder
  for name in modules:
    sys.modules.pop(name, None)


def test_the_front_page_is_short() -> None:
  lines = _FRONT.read_text().splitlines()
  assert len(lines) <= 200
  assert [line for line in lines if len(line) > 120] == []


@_each_page
def test_lines_of_prose_are_at_most_120_characters(page: pathlib.Path) -> None:
  lines = pages.prose(page.read_text()).splitlines()
  long = [x for x in lines if len(x) > 120 and not x.startswith('|')]
  assert long == []


def test_every_folder_has_a_page_that_the_front_page_links() -> None:
  folders = [path.parent for path in sorted(_PACKAGE.glob('*/__init__.py'))]
  folders += [_PACKAGE, _ROOT / 'configs', _ROOT / 'launch', _ROOT / 'tests']
  wanted = {f'{folder.relative_to(_ROOT)}/README.md' for folder in folders}
  assert len(wanted) > 10
  linked = {link.partition('#')[0] for link in pages.links(_FRONT.read_text())}
  assert wanted <= linked


def test_every_page_is_reached_from_the_front_page() -> None:
  reached, todo = set(), [_FRONT]
  while todo:
    page = todo.pop()
    if page in reached:
      continue
    reached.add(page)
    for link in pages.links(page.read_text()):
      target = (page.parent / link.partition('#')[0]).resolve()
      if target.suffix == '.md' and target.is_file():
        todo.append(target)
  assert set(pages.PAGES) == reached


@_each_page
def test_links_and_anchors_resolve(page: pathlib.Path) -> None:
  broken = []
  for link in pages.links(page.read_text()):
    if link.startswith('https://'):
      continue
    path, _, anchor = link.partition('#')
    target = page.parent / path if path else page
    if not target.exists():
      broken.append(link)
    elif anchor and anchor not in pages.anchors(target.read_text()):
      broken.append(link)
  assert broken == []


def _problem(line: str, shown: pathlib.Path) -> str:
  """What is wrong with a command line; '' if it parses."""
  words = pages.words(line)
  if not words or words[0] in _FOREIGN:
    return ''
  if words[0] == 'xpk':  # runs a command of ours in a container
    inner = [w.partition('=')[2] for w in words if w.startswith('--command=')]
    return _problem(inner[0], shown) if inner else 'no --command'
  script = next((w for w in words if re.search(r'launch/\w+\.sh$', w)), '')
  if script:
    return _problem_of_script(pathlib.Path(script).name, line, words, shown)
  if '-m' not in words:
    return f'unknown command {words[0]}'
  module, *arguments = words[words.index('-m') + 1 :]
  if module == 'ma_rlhf_jax':
    known = pages.lists_commands(arguments)
    return '' if known else f'unexpected {arguments}'
  if module.startswith('tests.benchmarks.'):
    path = _ROOT / (module.replace('.', '/') + '.py')
    shared = pages.argparse_flags(path.parent / 'recipes.py')
    return _unknown(arguments, pages.argparse_flags(path) | shared)
  try:
    values = pages.parse(module, arguments, shown)
  # Anything may be wrong, and all of it is reported.
  except Exception as error:
    return f'{type(error).__name__}: {error}'
  configs = [f.value for f in map(values.__getitem__, values)]
  found = [validation.problems(c) for c in configs if isinstance(c, ConfigDict)]
  return '; '.join(problem for problems in found for problem in problems)


def _problem_of_script(
    name: str, line: str, words: list[str], shown: pathlib.Path
) -> str:
  own = words[next(i for i, w in enumerate(words) if w.endswith(name)) + 1 :]
  if '--' in own:
    command = line.partition(' -- ')[2]
    if problem := _problem(command, shown):
      return problem
    own = own[: own.index('--')]
  if name == 'quickstart.sh':
    return _problem(f'python -m ma_rlhf_jax.train {" ".join(own)}', shown)
  known = pages.script_flags(name)
  if name == 'test.sh':
    known = pages.argparse_flags(_ROOT / 'tests' / 'conftest.py') | {'help'}
  return _unknown(own, known)


def _unknown(words: list[str], known: frozenset[str]) -> str:
  given = [w[2:].partition('=')[0] for w in words if w.startswith('--')]
  return ', '.join(name for name in given if name not in known)


@_each_page
def test_every_command_parses(page: pathlib.Path, shown: pathlib.Path) -> None:
  lines = pages.command_lines(page.read_text())
  wrong = {line: _problem(line, shown) for line in lines}
  assert {line: problem for line, problem in wrong.items() if problem} == {}


@pytest.mark.parametrize(
    'line',
    [
        'python -m ma_rlhf_jax --halp',
        'python -m ma_rlhf_jax train',
        'python -m ma_rlhf_jax --version --help',
        'python -m ma_rlhf_jax.trian',
        'python -m ma_rlhf_jax.train --work_dir=DIR',
        'python -m ma_rlhf_jax.train --config=configs/huge.py',
        'python -m ma_rlhf_jax.train --config.reward=my_rewards:gloomy',
        'python -m ma_rlhf_jax.tools.bench --lengths=long',
        'python -m tests.benchmarks.macro_step --recipes=hh_2b',
        './launch/local.sh --num_process=2 -- python -m ma_rlhf_jax.train',
        './launch/test.sh --fast',
    ],
)
def test_a_command_that_is_wrong_is_noticed(
    line: str, shown: pathlib.Path
) -> None:
  assert _problem(line, shown)


@pytest.mark.parametrize(
    'name',
    [
        'ma_rlhf_jax.__versions__',
        'training.ppo',
        'ppo.step.taken',
        'macro.aggregate.pool.sum',
    ],
)
def test_code_that_there_is_not_is_noticed(name: str) -> None:
  assert not pages.is_code(name)
  assert pages.is_code('ma_rlhf_jax.__version__')


@_each_page
def test_flags_and_commands_in_the_text_exist(
    page: pathlib.Path, shown: pathlib.Path
) -> None:
  known, wrong = pages.all_flags() | _ABSENT | {*HELP}, {}
  for span in pages.spans(page.read_text()):
    first = span.split()[0]
    if first in _FOREIGN:
      continue
    if span.startswith(('python -m', './launch/')):
      wrong[span] = _problem(span, shown)
    elif re.match(r'--config(\.\w+)*=\S', span):
      wrong[span] = _problem(f'python -m ma_rlhf_jax.train {span}', shown)
    else:
      names = re.findall(r'(?<![\w-])--(\w[\w.]*)', span)
      names += re.findall(r'^-\w+$', span)
      names = [n.removeprefix('config.').rstrip('.') for n in names]
      unknown = [n for n in names if n not in known and not pages.is_field(n)]
      wrong[span] = ', '.join(unknown)
  assert {span: problem for span, problem in wrong.items() if problem} == {}


def _is_something(name: str, page: pathlib.Path) -> bool:
  """Whether a dotted name is a field, a file, code, or not ours."""
  if name.split('.')[0] in _THEIRS:
    return True
  if re.search(r'\.(py|sh|md)$', name):
    folders = (page.parent, _ROOT, _PACKAGE, _ROOT / 'launch')
    return any((folder / name).is_file() for folder in folders)
  if re.search(r'\.(jsonl?|gz|partial|safetensors|json)$', name):
    return True  # made by a run, or the reader's own
  return pages.is_field(name) or pages.is_code(name)


@_each_page
def test_names_of_fields_files_and_code_exist(page: pathlib.Path) -> None:
  text = page.read_text()
  named = []
  for span in pages.spans(text):
    # `macro.value=start`, `read_metrics(folder)` and `configs/tiny.py:lora`
    name = re.split(r'[=(:]', span)[0]
    if re.fullmatch(r'[A-Za-z_][\w/]*(\.\w+)+', name) and '://' not in span:
      named.append(name)
  own = {*pages.files(text), 'recipe.py'}
  wrong = [n for n in named if n not in own and not _is_something(n, page)]
  assert wrong == []


@_each_page
def test_tests_that_a_page_names_exist(page: pathlib.Path) -> None:
  tests = {path.stem for path in (_ROOT / 'tests').rglob('*_test.py')}
  named = set(re.findall(r'\b[a-z]\w+_test\b', pages.prose(page.read_text())))
  assert named - tests == set()


def test_metrics_that_the_table_names_are_logged() -> None:
  text = (_PACKAGE / 'training' / 'README.md').read_text()
  group = 'loss|eval|objective|policy|critic|macro|response|sampler|time'
  metrics = {
      span
      for span in pages.spans(text)
      if re.fullmatch(rf'({group}|reward_model)/\w+', span)
  }
  assert len(metrics) > 40
  source = ''.join(path.read_text() for path in _PACKAGE.rglob('*.py'))
  logged = set(re.findall(r"[\w/]+(?=')", source))
  wrong = {m for m in metrics if not {m, m.split('/')[1]} & logged}
  assert wrong == set()


@_each_page
def test_code_of_pages_is_python(page: pathlib.Path) -> None:
  for language, text in pages.blocks(page.read_text()):
    assert language in ('', 'python', 'text', 'bibtex')
    if language == 'python':
      ast.parse(text)


def test_recipes_that_pages_show_are_valid(shown: pathlib.Path) -> None:
  paths = [p for p in shown.glob('*.py') if pages.is_recipe(p.read_text())]
  assert len(paths) == 2
  for path in paths:
    assert validation.problems(recipe.load(str(path))) == []


def test_the_pieces_print_what_the_page_says() -> None:
  page = _PACKAGE / 'macro' / 'pieces.md'
  code, printed = pages.blocks(page.read_text())
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(code.text, str(page), 'exec'), {})
  assert (code.language, printed.language) == ('python', 'text')
  assert out.getvalue() == printed.text


@pytest.mark.parametrize(
    ('page', 'names'),
    [
        ('macro', {*termination.RULES, *text_rules.RULES, 'parsing'}),
        ('objective', {*switches.VARIANTS, *switches.CONTROLS}),
        ('objective', {*switches.SETUPS, *config_lib.ARGUMENTS}),
        ('training', {*symptoms.CODES}),
        ('tools', {p.stem for p in (_PACKAGE / 'tools').glob('*[a-z].py')}),
    ],
)
def test_a_table_leaves_nothing_out(page: str, names: set[str]) -> None:
  text = (_PACKAGE / page / 'README.md').read_text()
  words = set(re.findall(r'\w+', ' '.join(pages.spans(text))))
  assert names - words - {'__init__', 'explore_view'} == set()


def test_the_results_name_every_recipe() -> None:
  text = (_ROOT / 'configs' / 'README.md').read_text()
  recipes = {path.name for path in (_ROOT / 'configs').glob('[a-z]*.py')}
  assert len(recipes) > 5
  assert {
      name for name in recipes if f'| `configs/{name}` |' not in text
  } == set()


def test_the_picture_is_light_and_dark() -> None:
  text = (_PACKAGE / 'macro' / 'macro_actions.svg').read_text()
  light, _, dark = text.partition('prefers-color-scheme: dark')
  classes = lambda part: set(re.findall(r'^\s+\.(\w+) \{', part, re.M))
  used = set(re.findall(r'class="(\w+)"', text)) - {'mid'}
  assert used <= classes(light) and used <= classes(dark)
