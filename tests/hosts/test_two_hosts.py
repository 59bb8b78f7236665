"""`validate` under torchrun on two hosts: run by `make hosts`, as root."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab.configs import TINY_TEXT
from tests.support.lab.hosts import Host, two_hosts

pytestmark = pytest.mark.hosts
START_SECONDS = 240.0  # two agents and two ranks import torch
TIMEOUT = 20.0


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path) as both:
        yield both


def told_by(text: str) -> str:
    """The line of the command among those of torchrun."""
    (line,) = re.findall(r"^moe-dispatch: .*$", text, re.MULTILINE)
    return line


def test_two_hosts_agree(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    with first.validate("tiny") as one, second.validate("tiny") as other:
        assert (one.end(seconds=START_SECONDS), other.end(seconds=START_SECONDS)) == (0, 0), one.text + other.text
        assert one.text.count(" agree ") == 12  # each row as it ends, and in the table
        assert "agree" not in other.text


def test_another_config_on_one_host_is_one_error_on_both(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    config = tmp_path / "other.toml"
    config.write_text(TINY_TEXT.replace("learning_rate = 3e-3", "learning_rate = 4e-3"))
    first, second = hosts
    with first.validate("tiny") as one, second.validate(str(config)) as other:
        assert one.end(seconds=START_SECONDS) != 0
        assert other.end(seconds=START_SECONDS) != 0
        told = (
            "moe-dispatch: the ranks were started differently: train.learning_rate is 0.003 on rank [0], 0.004 on "
            "rank [1]; start all of them alike"
        )
        assert told_by(one.text) == told_by(other.text) == told
        assert " agree " not in one.text


def test_a_link_that_goes_down_is_told_on_both_within_the_time_out(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    config = tmp_path / "long.toml"
    config.write_text(TINY_TEXT.replace("steps = 2", "steps = 5"))
    arguments = (str(config), "--timeout", str(TIMEOUT))
    first, second = hosts
    with first.validate(*arguments) as one, second.validate(*arguments) as other:
        one.wait_for("float32  FSDP2 x2  agree", seconds=START_SECONDS)
        first.cut_link()
        waited = max(program.wait_for("moe-dispatch: ", seconds=3 * TIMEOUT) for program in (one, other))
        assert waited < TIMEOUT + 10  # the row began after the cut, and it takes a while to find out who is missing
        assert "rank 1 does not answer: it ended, is stopped, or the link is down" in told_by(one.text)
        assert (
            "the store at 10.77.0.1:29511 does not answer: rank 0 ended, is stopped, or the link to it is down"
            in (told_by(other.text))
        )
        assert one.end(seconds=60) != 0
        assert other.end(seconds=60) != 0
