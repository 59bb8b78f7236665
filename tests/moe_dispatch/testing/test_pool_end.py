"""The end of ranks that are processes: nothing is left of them, however it comes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from moe_dispatch.testing import RankError, RankPool
from moe_dispatch.testing.call import check_main
from moe_dispatch.testing.processes import reaper, team
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
import multiprocessing, os, threading, time

if "SLOW" in os.environ:
    time.sleep(600)  # a rank imports this, before anything of ours

from moe_dispatch.testing import RankPool
from tests.support.dispatch.rank_cases import stand_in_three_places

if __name__ == "__main__":
    pool = RankPool()
    print(*pool.run(os.getpid, 1), *pool.run(os.getpid, 3), flush=True)
    threading.Thread(target=pool.run, args=(stand_in_three_places, 3), kwargs={"timeout": 600}).start()
    time.sleep(1.0)  # for the case to reach its places: idle, in a collective, in a sleep, done
    os.environ["SLOW"] = "yes"
    threading.Thread(target=RankPool().run, args=(os.getpid, 1)).start()
    while len(multiprocessing.active_children()) < 5:
        time.sleep(0.1)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
"""


def test_ranks_and_their_folders_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Also a rank that is still importing, and one that is stopped."""
    temporaries = tmp_path / "temporaries"
    temporaries.mkdir()
    script = run_script(tmp_path, SCRIPT_THAT_WAITS, folder_of_temporaries=temporaries)
    assert script.stdout is not None
    early = [int(pid) for pid in script.stdout.readline().split()]
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 5
    assert set(early) < set(pids)
    assert remaining(pids, seconds=0) == pids
    assert len(list(temporaries.iterdir())) == 3
    os.kill(early[1], signal.SIGSTOP)
    script.terminate()
    _, err = script.communicate(timeout=SOON_SECONDS)
    assert remaining(pids) == []
    assert err == ""
    deadline = time.monotonic() + SOON_SECONDS
    while list(temporaries.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(temporaries.iterdir()) == []


def test_the_reaper_kills_what_lives_and_removes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "ranks_x"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").touch()
    with subprocess.Popen(["sleep", "600"]) as living, subprocess.Popen(["true"]) as ended:
        ended.wait()
        reaper.outlive([f"{living.pid}\n", f"{ended.pid}\n"], str(folder))
        assert living.wait(timeout=SOON_SECONDS) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    reaper.outlive([], str(folder))  # the parent removed it


SCRIPT_WITHOUT_A_GUARD = """
from moe_dispatch.testing import run_ranks
from tests.support.dispatch.rank_cases import place

run_ranks(place, 1)
"""


def test_a_script_without_a_guard_is_told_what_to_do(tmp_path: Path) -> None:
    script = run_script(tmp_path, SCRIPT_WITHOUT_A_GUARD, folder_of_temporaries=tmp_path)
    _, err = script.communicate(timeout=120)
    assert script.returncode == 1
    assert (
        "rank 0 died with exit code 1\nbefore it could begin: a rank first imports the script that started it" in err
    )
    assert err.rstrip().endswith('put the calls of the script under `if __name__ == "__main__":`')


@pytest.mark.parametrize(
    ("file", "module", "refused"),
    [
        ("<stdin>", "__main__", True),
        ("<stdin>", "elsewhere", True),  # a rank would look for a file of this name
        (None, "__main__", True),
        (None, "elsewhere", False),
        (__file__, "__main__", False),
    ],
)
def test_a_program_that_no_rank_can_import_is_refused(
    file: str | None, module: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = ModuleType("__main__")
    if file:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)

    def fn() -> None: ...

    fn.__module__ = module
    message = (
        "fn cannot be called on ranks that are processes: a rank imports the caller's program, which is in no file"
    )
    expected = pytest.raises(ValueError, match=message) if refused else nullcontext()
    with expected:
        check_main(fn)
