"""Names of a table, and functions of the user's own by `module:function`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import importlib
import inspect
import os
import sys
from typing import Any

_folders: list[str] = []


def look_in(folder: str) -> None:
  """Modules are looked for in `folder` too, after all that is installed."""
  if folder not in _folders:
    _folders.append(folder)


@contextlib.contextmanager
def _found_there() -> Iterator[None]:
  """Inside, the current folder and those of `look_in` are searched, last.

  Not for longer: a library that tries for a package that is not installed would
  take a file of that name.
  """
  before = list(sys.path)
  sys.path += [f for f in (os.getcwd(), *_folders) if f not in sys.path]
  try:
    yield
  finally:
    sys.path[:] = before


def is_path(name: str) -> bool:
  """Whether `name` is `module:function`, not a key of a table."""
  return ':' in name


def load(
    path: str, field: str = 'function', takes: tuple[str, ...] = ()
) -> Callable[..., Any]:
  """The function that `module:function` names.

  Args:
    path: such as `my_rewards:politeness`.
    field: that holds it, for messages.
    takes: the names of what it is called with; () = anything.

  Raises:
    ValueError: if there is no such module or function, or it takes something
      else, with the cure.
  """
  module_name, _, name = path.partition(':')
  if not module_name or not name:
    raise ValueError(f'{field}={path!r} must be module:function')
  try:
    with _found_there():
      module = importlib.import_module(module_name)
  except Exception as error:  # a module is the user's code: it may raise any
    absent = isinstance(error, ModuleNotFoundError) and error.name
    if absent and f'{module_name}.'.startswith(f'{absent}.'):
      cause = (
          f"no module {module_name!r} in the current folder, the recipe's "
          'folder or the environment'
      )
    else:
      cause = f'importing {module_name} failed, {type(error).__name__}: {error}'
    raise ValueError(f'{field}={path!r}: {cause}') from error
  function = getattr(module, name, None)
  if not callable(function):
    where = getattr(module, '__file__', None) or f'module {module_name}'
    raise ValueError(f'{field}={path!r}: {where} has no function {name!r}')
  _check_arguments(function, takes, f'{field}={path!r}')
  return function


def _check_arguments(
    function: Callable[..., Any], takes: tuple[str, ...], where: str
) -> None:
  """Raises where a function cannot be called with so many arguments."""
  if not takes:
    return
  try:
    signature = inspect.signature(function)
  except ValueError:  # of a function in C, which says nothing
    return
  try:
    signature.bind(*takes)
  except TypeError as error:
    raise ValueError(
        f'{where} must take ({", ".join(takes)}), and is {signature}'
    ) from error


def resolve(
    table: Mapping[str, Any],
    name: str,
    field: str = 'function',
    takes: tuple[str, ...] = (),
) -> Any:
  """The entry `name` of a table, or the function that it names.

  Args:
    table: by name.
    name: a key, or `module:function`.
    field: that holds it, for messages.
    takes: see `load`.

  Raises:
    ValueError: if it is neither.
  """
  if name in table:
    return table[name]
  if is_path(name):
    return load(name, field, takes)
  raise ValueError(problem(table, name, field))


def problem(
    names: Iterable[str], name: str, field: str, takes: tuple[str, ...] = ()
) -> str:
  """Why a name is neither one of a table nor a function that can be loaded.

  Returns:
    One line, '' where it can be used.
  """
  if name in names:
    return ''
  if not is_path(name):
    known = ', '.join(names)
    return f'{field}={name!r} must be one of {known}, or module:function'
  try:
    load(name, field, takes)
  except ValueError as error:
    return str(error)
  return ''
