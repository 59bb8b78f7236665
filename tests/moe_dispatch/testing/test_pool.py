"""Ranks that are processes: they live on between cases, and are sent only what they can be sent."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_dispatch.testing import RankPool
from tests.support.dispatch.rank_cases import arguments_after_rank, settings


def test_a_rank_has_one_thread_and_talks_over_loopback(rank_pool: RankPool) -> None:
    assert rank_pool.run(settings, 2) == [(1, os.environ.get("GLOO_SOCKET_IFNAME", "lo"))] * 2


def test_sizes_live_side_by_side_and_serve_again(rank_pool: RankPool) -> None:
    pids_of_size = {ranks: rank_pool.run(os.getpid, ranks) for ranks in (1, 2, 3)}
    assert len({os.getpid()}.union(*pids_of_size.values())) == 1 + 1 + 2 + 3
    assert {ranks: rank_pool.run(os.getpid, ranks) for ranks in (3, 1, 2)} == pids_of_size


def test_a_module_found_on_a_later_path_is_found_in_the_ranks(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = rank_pool.run(os.getpid, 2)
    (tmp_path / "found_later.py").write_text("import os\n\ndef pid() -> int:\n    return os.getpid()\n")
    monkeypatch.syspath_prepend(tmp_path)
    from found_later import pid  # type: ignore[import-not-found]

    assert rank_pool.run(pid, 2) == pids


def test_an_interrupt_from_the_terminal_leaves_the_ranks_to_the_parent(rank_pool: RankPool) -> None:
    pids = rank_pool.run(os.getpid, 2)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert rank_pool.run(os.getpid, 2) == pids


def local_function() -> Callable[[], None]:
    def local() -> None: ...

    return local


@pytest.mark.parametrize("case", [lambda: None, local_function()])
def test_a_function_that_a_rank_cannot_import_is_refused(rank_pool: RankPool, case: Callable[[], None]) -> None:
    pids = rank_pool.run(os.getpid, 2)
    rule = r"a rank imports the function by name .* define it with `def` at the top of a module"
    with pytest.raises(ValueError, match=rf"<locals>.* cannot be sent to a rank .*{rule}|<lambda>.*{rule}"):
        rank_pool.run(case, 2)
    with pytest.raises(ValueError, match=rf"arguments_after_rank.*<lambda>.*{rule}, and pass plain values"):
        rank_pool.run(arguments_after_rank, 2, lambda: None)
    assert rank_pool.run(os.getpid, 2) == pids
