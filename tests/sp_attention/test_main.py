"""``python -m sp_attention``: the table, and that it can say no."""

import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import sp_attention.__main__ as program
from moe_dispatch.testing import RankPool
from sp_attention import Scheme

ROOT = Path(program.__file__).parents[1]
NAMES = [
    "uneven lengths",
    "fewer tokens than ranks",
    "fewer heads than ranks",
    "groups that straddle ranks",
    "widths of MLA",
    "sliding window",
    "key padding",
    "packed, NaN between",
    "sinks",
    "cross-attention",
    "zigzag order",
    "sequence first",
    "gathered keys, zigzag",
    "ring keys, packed, NaN",
    "2 x 2, window, chunks",
]


def assert_every_case_agrees(text: str) -> None:
    title, _, header, *rows = text.splitlines()
    assert title == "attention over 4 ranks and on one, float64: max |difference|, at most 1e-12"
    assert re.split(r"  +", header) == list(program.HEADER)
    assert [row.split("  ")[0] for row in rows] == NAMES
    starts = [header.index(name) for name in ("tokens", " q ", " k ", " v ", "out", "dq", "dk", "dv", "verdict")]
    for row in rows:
        assert row.endswith("agrees")
        assert all(row[start - 1] == " " for start in starts)  # aligned
        cells = re.split(r"  +", row)
        assert len(cells) == len(program.HEADER)
        assert all(re.fullmatch(r"\d\.\de[-+]\d\d", cell) for cell in cells[5:9])


def test_the_command_prints_a_table_and_succeeds(rank_pool: RankPool, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(program, "RankPool", return_value=nullcontext(rank_pool)):
        assert program.main() == 0
    assert_every_case_agrees(capsys.readouterr().out)


@pytest.mark.sweep
def test_the_command_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sp_attention"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_every_case_agrees(done.stdout)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("status", [0, 1])
def test_the_exit_status_is_that_of_the_report(status: int) -> None:
    argv = mock.patch.object(sys, "argv", ["sp_attention"])
    with argv, mock.patch.object(program, "report", return_value=status), pytest.raises(SystemExit) as exit_info:
        runpy.run_module("sp_attention", run_name="__main__")
    assert exit_info.value.code == status


@pytest.mark.parametrize(
    ("argument", "status", "told"),
    [
        ("--help", 0, "Exit status: 0 if all cases agree, 1 if not."),
        ("tiny", 2, "unrecognized arguments: tiny"),
        ("--ranks", 2, "unrecognized arguments: --ranks"),
    ],
)
def test_help_and_wrong_arguments_run_nothing(
    argument: str, status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(program, "RankPool", side_effect=AssertionError), pytest.raises(SystemExit) as exit_info:
        program.main([argument])
    assert exit_info.value.code == status
    out, err = capsys.readouterr()
    assert told in (err if status else out)


def table(pool: RankPool, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[list[str]]]:
    status = program.report(pool)
    return status, [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]


def wrong_by(error: float) -> Any:
    def reference(q_BLNH: Tensor, k_BLGH: Tensor, v_BLGH: Tensor, **options: Any) -> Tensor:
        out = program_reference(q_BLNH, k_BLGH, v_BLGH, **options)
        return out + error if options.get("window") and q_BLNH.shape[2] == 4 else out

    return reference


program_reference = program.reference_attention


@pytest.mark.parametrize("error", [1e-9, math.nan])
def test_one_case_that_differs_fails_the_command(
    error: float, rank_pool: RankPool, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(program, "reference_attention", wrong_by(error)):
        status, rows = table(rank_pool, capsys)
    assert status == 1
    assert [row[0] for row in rows if row[-1] == "DIFFERS"] == ["sliding window"]
    (row,) = (row for row in rows if row[-1] == "DIFFERS")
    assert row[5] == ("1.0e-09" if error == 1e-9 else "nan")


def test_a_wrong_gradient_alone_fails_the_command(rank_pool: RankPool, capsys: pytest.CaptureFixture[str]) -> None:
    def reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = program_reference(q, k, v, **options)
        return out + (k - k.detach()).sum() * 1e-6  # equal, but for dk

    with mock.patch.object(program, "reference_attention", reference):
        status, rows = table(rank_pool, capsys)
    assert status == 1
    assert [row[-1] for row in rows[1:]] == ["DIFFERS"] * len(NAMES)
    assert max(float(row[column]) for row in rows[1:] for column in (5, 6, 8)) < 1e-12
    assert min(float(row[7]) for row in rows[1:]) > 1e-9


def test_each_case_is_what_its_name_says() -> None:
    cases = {case.name: case for case in program.cases()}
    assert list(cases) == NAMES
    assert len(set(cases["uneven lengths"].seq)) > 1
    assert sum(cases["fewer tokens than ranks"].seq) < program.RANKS
    assert cases["fewer heads than ranks"].heads[0] < program.RANKS
    num_heads, num_kv = cases["groups that straddle ranks"].heads
    assert (num_heads, num_kv) == (6, 2)  # ranks hold heads 01 23 4 5, groups are 012 345
    assert cases["widths of MLA"].widths == (192, 128)
    window = cases["sliding window"]
    assert max(window.seq) <= window.options["window"][0] < sum(window.seq)  # B24: local length, window, whole
    padding = cases["key padding"].options["key_padding_mask"]
    assert padding.shape == (2, sum(cases["key padding"].seq))
    assert bool(padding.any())
    assert not bool(padding.all())
    packed = cases["packed, NaN between"]
    ends, starts = (packed.options[name].tolist() for name in ("cu_seqlens", "cu_seqlens_padded"))
    real = {start + i for a, b, start in zip(ends, ends[1:], starts, strict=False) for i in range(b - a)}
    assert set(range(sum(packed.seq))) - real == set(packed.nan_at)
    assert all(bool(x[:, list(packed.nan_at)].isnan().all()) for x in packed.tensors())
    assert "sinks_N" in cases["sinks"].options
    assert cases["cross-attention"].kv_seq not in (None, cases["cross-attention"].seq)
    zigzag, _, _ = cases["zigzag order"].shardings
    assert [len(zigzag.runs(rank)) for rank in range(program.RANKS)] == [2, 2, 2, 1]
    assert len(set(zigzag.local_sizes)) > 1
    assert cases["sequence first"].order == "LB"
    assert cases["gathered keys, zigzag"].scheme == Scheme.gather()
    assert cases["gathered keys, zigzag"].heads[1] < program.RANKS
    ring, chunks = cases["ring keys, packed, NaN"], cases["2 x 2, window, chunks"]
    assert (ring.nan_at, ring.scheme) == (packed.nan_at, Scheme.ring())
    assert chunks.scheme.team_size(program.RANKS) == 2
    assert chunks.heads[0] % 2
    assert max(chunks.seq) % chunks.scheme.chunk + min(chunks.seq) % chunks.scheme.chunk


def test_tensors_are_the_same_in_every_process_and_of_every_case_another() -> None:
    first, second = program.cases()[0], program.cases()[0]
    assert all(torch.equal(x, y) for x, y in zip(first.tensors(), second.tensors(), strict=True))
    seen = {case.tensors()[0].flatten()[0].item() for case in program.cases()}
    assert len(seen) == len(NAMES)
