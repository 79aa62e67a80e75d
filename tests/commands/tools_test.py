"""The help of the tools."""

import re

import pytest

from ma_rlhf_jax.commands import tools
from ma_rlhf_jax.commands.command import Command
from ma_rlhf_jax.parallel.chips import GPUS, TPUS
from tests import helped

_TOOLS = (tools.PLAN, tools.BENCH, tools.EXPLORE, tools.LAYOUT)


@pytest.mark.parametrize('command', _TOOLS, ids=lambda command: command.name)
def test_help_is_whole(
    command: Command,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  helped.check_command(command, capsys, monkeypatch)


def test_every_machine_that_is_known_stands_in_the_help() -> None:
  topology = tools.PLAN.flags[0]
  assert topology.name == 'topology'
  named = set(re.findall(r'[a-z0-9-]+', topology.help))
  assert named >= GPUS.keys() | TPUS.keys()


def test_exit_codes_of_plan_stand_in_its_help() -> None:
  text = tools.PLAN.text()
  assert re.findall(r'^  (\d+) ', text, re.M) == ['0', '1', '3', '130']
