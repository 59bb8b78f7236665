"""The end of ranks that are processes: nothing is left of them, however it comes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_dispatch.testing import RankError, RankPool, team
from tests.support.dispatch.rank_cases import SOON_SECONDS, place, remaining, sleep_at_exit, write_at_exit


def run_script(folder: Path, text: str, *, folder_of_temporaries: Path) -> "subprocess.Popen[str]":
    """A Python program of its own, with warnings as errors."""
    script = folder / "script.py"
    script.write_text(text)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder_of_temporaries)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_closing_leaves_no_process_no_descriptor_and_no_file(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_pool.run(place, 1)  # from the first spawn on, Python keeps a helper process of its own
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = os.listdir("/proc/self/fd")
    with RankPool() as pool:
        pids = pool.run(os.getpid, 1) + pool.run(os.getpid, 2)
        assert len(list(tmp_path.iterdir())) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert list(tmp_path.iterdir()) == []
    pool.close()
    with pytest.raises(ValueError, match=r"^this RankPool is closed; .* make a new one$"):
        pool.run(place, 1)


@pytest.mark.parametrize(("fail", "written"), [(False, ["rank_0", "rank_1"]), (True, ["rank_1"])])
def test_a_rank_that_is_not_stuck_returns_so_that_coverage_is_written(
    tmp_path: Path, fail: bool, written: list[str]
) -> None:
    with RankPool() as pool:
        if fail:
            with pytest.raises(RankError, match="the fact of rank 1"):
                pool.run(write_at_exit, 2, tmp_path, True)
        else:
            pool.run(write_at_exit, 2, tmp_path, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == written


def test_a_rank_that_does_not_end_when_asked_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "END_SECONDS", 0.5)
    started = time.monotonic()
    with RankPool() as pool:
        pids = pool.run(sleep_at_exit, 1)
    assert time.monotonic() - started < SOON_SECONDS
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


SCRIPT_THAT_ENDS = """
import os
from moe_dispatch.testing import run_ranks

def pid(rank: int) -> int:
    return os.getpid()

if __name__ == "__main__":
    print(*run_ranks(pid, 2))
    print(*run_ranks(pid, 2, timeout=30))
"""


def test_run_ranks_in_a_script_keeps_its_ranks_until_the_script_ends(tmp_path: Path) -> None:
    temporaries = tmp_path / "temporaries"
    temporaries.mkdir()
    script = run_script(tmp_path, SCRIPT_THAT_ENDS, folder_of_temporaries=temporaries)
    out, err = script.communicate(timeout=120)
    assert (script.returncode, err) == (0, "")
    first, second = (line.split() for line in out.splitlines())
    assert first == second
    assert remaining(map(int, first), seconds=0) == []
    assert list(temporaries.iterdir()) == []


SCRIPT_THAT_FORGETS = """
import os
from moe_dispatch.testing import RankPool

if __name__ == "__main__":
    print(*RankPool().run(os.getpid, 1))
    pool = RankPool()
    print(*pool.run(os.getpid, 1))
"""


def test_a_pool_that_nobody_closes_does_not_keep_its_process_from_ending(tmp_path: Path) -> None:
    script = run_script(tmp_path, SCRIPT_THAT_FORGETS, folder_of_temporaries=tmp_path)
    out, err = script.communicate(timeout=120)
    assert script.returncode == 0
    assert remaining(map(int, out.split())) == []
    assert "ResourceWarning" in err
    assert "EOFError" not in err


SCRIPT_THAT_WAITS = """
import os
from moe_dispatch.testing import RankPool
from tests.support.dispatch.rank_cases import stand_in_three_places

if __name__ == "__main__":
    pool = RankPool()
    print(*pool.run(os.getpid, 1), *pool.run(os.getpid, 3), flush=True)
    pool.run(stand_in_three_places, 3, timeout=600)
"""


def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = run_script(tmp_path, SCRIPT_THAT_WAITS, folder_of_temporaries=tmp_path)
    assert script.stdout is not None
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 4
    time.sleep(1.0)  # for the case to reach its places: idle, in a collective, in a sleep, done
    assert remaining(pids, seconds=0) == pids
    script.kill()
    _, err = script.communicate(timeout=SOON_SECONDS)
    assert remaining(pids) == []
    assert err == ""
