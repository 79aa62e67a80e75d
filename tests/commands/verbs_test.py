"""The help of the verbs, and defaults that stand in two places."""

import dataclasses
import pathlib

import pytest

from ma_rlhf_jax import export
from ma_rlhf_jax.commands import verbs
from ma_rlhf_jax.commands.command import Command
from ma_rlhf_jax.config import ARGUMENTS, default_recipe
from ma_rlhf_jax.generation.request import Request
from ma_rlhf_jax.parallel.cluster import Cluster
from ma_rlhf_jax.switches import WORDS
from tests import helped

_VERBS = (verbs.TRAIN, verbs.GENERATE, verbs.EVALUATE, verbs.EXPORT)


@pytest.mark.parametrize('command', _VERBS, ids=lambda command: command.name)
def test_help_is_whole(
    command: Command,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  helped.check_command(command, capsys, monkeypatch)


@pytest.mark.parametrize(
    ('table', 'request_type'),
    [
        (verbs.GENERATE.flags, Request),
        (verbs.EXPORT.flags, export.Request),
        (verbs.PROCESSES, Cluster),
    ],
)
def test_flags_have_the_names_and_defaults_of_what_they_fill(
    table: tuple, request_type: type
) -> None:
  fields = {field.name: field for field in dataclasses.fields(request_type)}
  assert {flag.name for flag in table} == fields.keys()
  for flag in table:
    default = fields[flag.name].default
    if default is dataclasses.MISSING:  # it is needed
      assert not flag.default
    else:
      assert (flag.name, flag.default) == (flag.name, default)


def test_every_argument_of_a_recipe_stands_in_the_help() -> None:
  recipe, _ = verbs.RECIPE
  for word in WORDS:
    assert word in recipe.help
  for name in ARGUMENTS:
    assert f'{name}=' in recipe.help
  path = pathlib.Path(default_recipe()).relative_to(helped.ROOT)
  assert recipe.shown.startswith(str(path))
