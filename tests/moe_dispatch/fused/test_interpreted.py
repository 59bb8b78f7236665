"""The fused kernels, in Triton's interpreter, on the CPU: what they compute, and the library with them.

They run in a process of their own: whether a kernel is compiled or interpreted is fixed when triton is imported.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moe_dispatch.plan import row_index
from moe_dispatch.rows import buffer, sums
from moe_dispatch.rows.buffer import RowFormat
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.compile import untraced
from tests.support.dispatch.dense import Answer, Case, dense_answer, differences, make_case
from tests.support.dispatch.layer import Layer, failures_of
from tests.support.dispatch.layouts import Layout
from tests.support.dispatch.plans import KINDS, Kind, enough, planning

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (24, 5, 1032)
# Unit roundoff of the dtype that a result is rounded to; float32 sums of at most 5 terms of order 1 add 2e-6.
ROUNDED = {torch.float64: 1e-14, torch.float32: 6e-8, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ENTRIES, FIRST = torch.tensor([4, 0, 4, 1, 2, 6, 5, 3, 0, 1]), torch.tensor([0, 3, 3, 5])


@pytest.fixture(scope="module")
def interpreter() -> Iterator[RankPool]:
    with pytest.MonkeyPatch.context() as environment, RankPool() as pool:
        environment.setenv("TRITON_INTERPRET", "1")
        yield pool


@contextmanager
def fused(is_fused: bool = True) -> Iterator[list[int]]:
    """With the kernels, wherever they have a place; yields a list that has an item per place that was asked."""
    asked: list[int] = []

    def runs_fused(*tensors: Tensor) -> bool:
        asked.append(len(tensors))
        return is_fused

    with ExitStack() as patched:
        for module in (buffer, sums, row_index):
            patched.enter_context(patch.object(module, "runs_fused", runs_fused))
        yield asked


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@untraced()
def check_sums() -> None:
    """Of rows that are columns of others, from the first or another one, and of those whose columns lie together."""
    for i, (dtype, width) in enumerate(product(DTYPES, WIDTHS)):
        wide_ND, a_ND, weight_N = drawn(7, width + 8, dtype=dtype), drawn(10, width, dtype=dtype), torch.rand(10)
        rows_ND = (wide_ND[:, :width], wide_ND[:, 3 : 3 + width], wide_ND[:, :width].T.contiguous().T)[i % 3]
        with fused():
            got = sums.sum_rows(rows_ND, ENTRIES, FIRST)
            got_weighted = sums.sum_weighted_rows(rows_ND, weight_N, ENTRIES, FIRST)
            got_each = sums.weigh_rows(rows_ND, weight_N, ENTRIES)
            got_dots = sums.dot_rows(a_ND, rows_ND, ENTRIES)
        terms_ND = rows_ND[ENTRIES].double()
        weighted_ND = terms_ND * weight_N.double().unsqueeze(1)
        pairs = (got, in_runs(terms_ND)), (got_weighted, in_runs(weighted_ND)), (got_each, weighted_ND)
        relative, absolute = ROUNDED[dtype], 1e-14 if dtype == torch.float64 else 2e-6
        for x, wanted in pairs:
            assert x.dtype == dtype
            assert ((x.double() - wanted).abs() <= relative * wanted.abs() + absolute).all(), (dtype, width)
        wanted = (a_ND.double() * terms_ND).sum(1)
        assert got_dots.dtype == torch.promote_types(dtype, torch.float32)
        assert (got_dots - wanted).abs().max() <= (1e-13 if dtype == torch.float64 else 1e-4), (dtype, width)


def in_runs(terms_ND: Tensor) -> Tensor:
    ends = [*FIRST.tolist()[1:], len(terms_ND)]
    return torch.stack([terms_ND[start:end].sum(0) for start, end in zip(FIRST.tolist(), ends, strict=True)])


def test_sums_are_those_of_plain_loops(interpreter: RankPool) -> None:
    interpreter.run(check_sums, 1)


def check_numbers_that_are_none() -> None:
    """Ties go to even, a NaN stays where it is, and infinities come through, also in sums of nothing else."""
    inf, nan = float("inf"), float("nan")
    for dtype, half in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        rows_ND = torch.tensor([[1.0, 1 + 2 * half, inf, nan, -inf], [half, half, 0, 0, 0]], dtype=dtype)
        with fused():
            got = sums.sum_rows(rows_ND, torch.tensor([0, 1, 1]), torch.tensor([0, 2, 3]))
        assert got[0].tolist()[:3] == [1.0, 1 + 4 * half, inf], dtype
        assert got[0, 3].isnan()
        assert got[0, 4] == -inf
        assert torch.equal(got[1], rows_ND[1])
        with fused():
            ones = sums.dot_rows(torch.ones(1, 2, dtype=dtype), rows_ND[1:, :2], torch.tensor([0]))
        assert ones.tolist() == [2 * half]


def test_rounding_is_to_even(interpreter: RankPool) -> None:
    interpreter.run(check_numbers_that_are_none, 1)


def check_rows_beside_weights() -> None:
    row_of_N, row_of_M, choice_of_M = (torch.randint(0, high, (6,)) for high in (4, 6, 3))
    for i, (dtype, width) in enumerate(product(DTYPES, WIDTHS)):
        weight_dtype = (torch.float32, torch.bfloat16)[i % 2]
        parts = [drawn(4, width, dtype=dtype), drawn(4, 3, dtype=weight_dtype)]
        apart = [
            part.T.contiguous().T if i else torch.cat([part, part], 1)[:, :width] for i, part in enumerate(parts)
        ]
        more = [torch.randint(0, 100, (4, 4), dtype=torch.uint8), torch.randint(0, 100, (4, 1), dtype=torch.int32)]
        for tensors in (parts, apart, parts + more):
            found = []
            for is_fused in (False, True):
                row_format = RowFormat(*tensors)
                buffer_NC = row_format.empty(6, row_of_N.device).zero_()
                with fused(is_fused) as asked:
                    row_format.gather(row_of_N, tensors, buffer_NC)
                    x_MD, weight_M = row_format.expand(buffer_NC, row_of_M, choice_of_M)
                assert len(asked) == 2
                found.append((buffer_NC, x_MD, weight_M))
            for plain, one_pass in zip(*found, strict=True):
                assert plain.dtype == one_pass.dtype
                assert torch.equal(plain, one_pass), (dtype, weight_dtype, width)


def test_rows_and_what_rides_with_them_are_the_same_bits(interpreter: RankPool) -> None:
    interpreter.run(check_rows_beside_weights, 1)


def check_indices() -> None:
    for num_sources, num_choices in ((1, 1), (300, 8)):  # one, and more than a program has
        mine_GK = torch.randint(0, 3, (num_sources * num_choices,)).index_fill_(0, torch.tensor([0]), 1)
        num_rows = int((mine_GK > 0).sum())
        found = []
        for is_fused in (False, True):
            with fused(is_fused) as asked:
                entries = row_index.Entries.of(
                    torch.nonzero_static(mine_GK, size=num_rows)[:, 0],
                    mine_GK,
                    token_of_source=torch.arange(num_sources) * 2,
                    received_of_source=torch.arange(num_sources) + 1,
                    num_choices=num_choices,
                    num_tokens=2**40,  # keys do not fit 32 bits
                )
                key_M, in_order = row_index.rows_in_order(entries)
            assert len(asked) == 2
            found.append([entries.number_M, entries.key_M, entries.told_3M, key_M, *in_order.values()])
        assert len(found[0][0]) == num_rows
        for plain, one_pass in zip(*found, strict=True):
            assert torch.equal(plain, one_pass)


def test_indices_of_a_plan_are_the_same(interpreter: RankPool) -> None:
    interpreter.run(check_indices, 1)


def check_nothing() -> None:
    """No rows, no entries, no tokens: no launch, and the same shapes."""
    none, none_ND = torch.empty(0, dtype=torch.int64), torch.empty(0, 8)
    with fused():
        assert sums.sum_rows(none_ND, none, none).shape == (0, 8)
        assert torch.equal(sums.sum_rows(none_ND, none, torch.zeros(3, dtype=torch.int64)), torch.zeros(3, 8))
        assert sums.dot_rows(none_ND, none_ND, none).shape == (0,)
        row_format = RowFormat(none_ND, torch.empty(0, 2))
        buffer_NC = row_format.empty(0, none.device)
        row_format.gather(none, [none_ND, torch.empty(0, 2)], buffer_NC)
        x_MD, weight_M = row_format.expand(buffer_NC, none, none)
    assert (x_MD.shape, weight_M.shape) == ((0, 8), (0,))


def test_nothing_is_nothing(interpreter: RankPool) -> None:
    interpreter.run(check_nothing, 1)


def run_layer(rank: int, case: Case, answer: Answer, kind: Kind, weigh_in_combine: bool) -> list[str]:
    with planning(kind, rank, enough(case)) as plan:
        layer = Layer(rank, case, plan, weigh_in_combine=weigh_in_combine)
        return failures_of(case, differences(layer.backward(), answer.for_rank(rank, case)))


@untraced()
def check_layers() -> None:
    with fused() as asked, RankThreads() as threads:
        for kind, weigh_in_combine in (*product(KINDS[:1], (False, True)), *((kind, True) for kind in KINDS[1:])):
            layout = Layout(batch=(2,), seq=(3, 0, 5, 2))
            case = make_case(layout, "holes", experts=(2, 1, 0, 3), num_choices=3, dim=8, width=6)
            found = threads.run(run_layer, 4, case, dense_answer(case), kind, weigh_in_combine)
            assert found == [[]] * 4, found
    assert len(asked) > 100  # all of it went through the kernels


def test_a_layer_equals_the_dense_one(interpreter: RankPool) -> None:
    interpreter.run(check_layers, 1)
