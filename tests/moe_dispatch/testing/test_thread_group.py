"""Collectives of ranks that are threads: the numbers that gloo gives, and calls that do not fit together."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from moe_dispatch import build_mesh
from moe_dispatch.testing import RankError, RankPool, RankThreads, RankTimeout
from tests.support.ranks import world

RANKS = 4


def numbers(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Other ones on each rank."""
    return (torch.arange(torch.Size(shape).numel()).view(shape) + 100 * rank).to(dtype)


# ---- as gloo ---------------------------------------------------------------------------------------


def uneven_rows(rank: int) -> list[Any]:
    """Rank r sends (r + p) % 3 rows to rank p: none to some."""
    sent, received = ([(rank + p) % 3 for p in range(RANKS)] for _ in range(2))
    results = []
    for dtype in (torch.uint8, torch.bfloat16, torch.complex64):
        rows, out = numbers(rank, sum(sent), 2, dtype=dtype), torch.empty(sum(received), 2, dtype=dtype)
        dist.all_to_all_single(out, rows, received, sent)
        results.append(out)
    out = torch.empty(RANKS, 3)
    dist.all_to_all_single(out, numbers(rank, RANKS, 3))
    return [*results, out]


def nothing_at_all(rank: int) -> list[Any]:
    out = torch.empty(0, 5)
    dist.all_to_all_single(out, torch.empty(0, 5), [0] * RANKS, [0] * RANKS)
    dist.barrier()
    return [out]


def reductions(rank: int) -> list[Any]:
    results = []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
        x = numbers(rank + 1, 3, dtype=torch.int32)
        dist.all_reduce(x, op)
        results.append(x)
    scalar, average, scattered, one = torch.tensor(1.0 + rank), numbers(rank, 3), torch.empty(2), torch.empty(3)
    dist.all_reduce(scalar)
    dist.reduce_scatter_single(scattered, numbers(rank, 2 * RANKS))
    dist.reduce_scatter(one, list(numbers(rank, RANKS, 3)))
    return [*results, scalar, average, scattered, one]


def gathers(rank: int) -> list[Any]:
    parts, whole, at_2, objects = numbers(0, RANKS, 2), torch.empty(RANKS, 3), numbers(0, RANKS, 2), [None] * RANKS
    dist.all_gather(list(parts), numbers(rank, 2))
    dist.all_gather_single(whole, numbers(rank, 1, 3))
    dist.gather(numbers(rank, 2), list(at_2) if rank == 2 else None, dst=2)
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * rank})
    return [parts, whole, at_2, objects]


def from_one(rank: int) -> list[Any]:
    x, part, objects = numbers(rank, 3), torch.empty(2), [rank, "of one rank"]
    dist.broadcast(x, src=2)
    dist.scatter(part, list(numbers(rank, RANKS, 2)) if rank == 1 else None, src=1)
    dist.broadcast_object_list(objects, src=3)
    return [x, part, objects]


def subgroups(rank: int) -> list[Any]:
    """Two halves, of which the second counts backwards, and a mesh."""
    halves = [dist.new_group([0, 1]), dist.new_group([3, 2])]
    group, x = halves[rank // 2], numbers(rank, 2)
    assert isinstance(group, dist.ProcessGroup)
    dist.all_reduce(x, group=group)
    mesh = build_mesh(dp=2, sp=2, ep=2, device_type="cpu")
    ep, y = mesh.expert.get_group("ep"), torch.empty(2)
    dist.all_to_all_single(y, numbers(rank, 2), group=ep)
    edp, z = mesh.expert.get_group("edp"), numbers(rank, 2)
    dist.broadcast(z, group=edp, group_src=1)
    groups = [(one.rank(), one.size(), dist.get_process_group_ranks(one)) for one in (world(), group, ep, edp)]
    dist.destroy_process_group(group)
    return [x, y, z, groups, mesh.ep_ranks, dist.get_rank(), dist.get_rank(ep), dist.get_world_size(edp)]


def tensors_of_a_mesh(rank: int) -> list[Any]:
    """DTensor finds its groups by name, in C++."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    x = DTensor.from_local(numbers(rank, 2, 3), mesh, [Shard(0), Partial()]).redistribute(
        placements=[Replicate()] * 2
    )
    weight = torch.nn.Parameter(distribute_tensor(numbers(0, 4, 3), mesh, [Shard(0), Replicate()]))
    product = x @ weight.T
    assert isinstance(product, DTensor)
    y = product.full_tensor()
    y.square().sum().backward()
    assert isinstance(weight.grad, DTensor)
    return [x.to_local(), y.detach(), weight.grad.to_local(), mesh.get_coordinate()]


@pytest.mark.parametrize(
    "case", [uneven_rows, nothing_at_all, reductions, gathers, from_one, subgroups, tensors_of_a_mesh]
)
def test_numbers_are_those_of_gloo(
    rank_pool: RankPool, rank_threads: RankThreads, case: Callable[[int], list[Any]]
) -> None:
    for got, expected in zip(rank_threads.run(case, RANKS), rank_pool.run(case, RANKS), strict=True):
        for mine, gloos in zip(got, expected, strict=True):
            assert torch.equal(mine, gloos) if isinstance(mine, Tensor) else mine == gloos


def test_the_average_is_the_sum_over_the_ranks(rank_threads: RankThreads) -> None:
    def average(rank: int) -> list[float]:
        x = numbers(rank, 2)
        dist.all_reduce(x, dist.ReduceOp.AVG)  # gloo has none
        return x.tolist()

    assert rank_threads.run(average, 3) == [[100.0, 101.0]] * 3


# ---- in the background -----------------------------------------------------------------------------


def test_ranks_work_while_an_exchange_is_on_its_way(rank_threads: RankThreads) -> None:
    seen = []

    def overlap(rank: int) -> list[float]:
        out = torch.full((2,), -1.0)
        first = dist.all_to_all_single(out, numbers(rank, 2), async_op=True)
        other = numbers(rank, 1)
        second = dist.all_reduce(other, async_op=True)
        assert first is not None
        assert second is not None
        seen.append((rank, out.tolist(), first.is_completed()))
        second.wait()
        first.wait()
        first.wait()  # again: nothing happens
        return out.tolist() + other.tolist()

    assert rank_threads.run(overlap, 2) == [[0.0, 100.0, 100.0], [1.0, 101.0, 100.0]]
    # What arrives is written by wait(), as late as a backend may.
    assert seen == [(0, [-1.0, -1.0], False), (1, [-1.0, -1.0], True)]


def test_a_write_to_what_is_on_its_way_is_an_error(rank_threads: RankThreads) -> None:
    def overwrite(rank: int, after: bool) -> float:
        rows, out = torch.full((2,), float("nan")), torch.empty(2)
        work = dist.all_to_all_single(out, rows, async_op=True)
        assert work is not None
        if after:
            work.wait()
        rows.zero_()
        work.wait()
        return out[0].item()

    assert all(x != x for x in rank_threads.run(overwrite, 2, True))
    text = r"rank 1 wrote to what it sends in all_to_all_single of torch.float32 before wait\(\)"
    with pytest.raises(RankError, match=text):
        rank_threads.run(overwrite, 2, False)


def test_an_output_is_written_behind_autograds_back_as_by_a_backend(rank_threads: RankThreads) -> None:
    def square(rank: int) -> list[float]:
        x = torch.tensor([2.0, 3.0], requires_grad=True)
        with torch.no_grad():
            out = torch.empty(2)
        y = (x * out).sum()  # keeps ``out``
        dist.all_to_all_single(out, x)
        y.backward()
        assert x.grad is not None
        return x.grad.tolist()

    assert rank_threads.run(square, 2) == [[2.0, 2.0], [3.0, 3.0]]


# ---- what does not fit together --------------------------------------------------------------------


def told(call: Callable[[], object]) -> str:
    with pytest.raises(RuntimeError) as error:
        call()
    return str(error.value)


def exchange(rank: int, sent: list[list[int]], received: list[list[int]]) -> str:
    rows, out = numbers(rank, sum(sent[rank]), 2), torch.empty(sum(received[rank]), 2)
    return told(lambda: dist.all_to_all_single(out, rows, received[rank], sent[rank]))


def test_counts_that_differ_between_sender_and_receiver_are_an_error_on_all(rank_threads: RankThreads) -> None:
    texts = rank_threads.run(exchange, 3, [[1, 1, 1], [1, 1, 3], [1, 1, 1]], [[1, 1, 1], [1, 1, 1], [1, 2, 1]])
    fact = "rank 1 sends 6 numbers to rank 2, which expects 4, in all_to_all_single of torch.float32"
    assert texts == [f"{fact}; both have to know the same count"] * 3
    texts = rank_threads.run(lambda rank: told(lambda: dist.all_reduce(torch.ones(1 + rank // 2))), 3)
    assert texts[0].startswith(
        "rank 0 sends 1 numbers to rank 2, which expects 2, in all_reduce SUM of torch.float32"
    )
    assert len(set(texts)) == 1


def in_another_order(rank: int) -> None:
    (dist.barrier if rank == 1 else lambda: dist.all_reduce(torch.ones(1)))()


def of_another_dtype(rank: int) -> None:
    dist.all_reduce(torch.ones(1, dtype=torch.float64 if rank == 1 else torch.float32))


def with_another_operator(rank: int) -> None:
    dist.all_reduce(torch.ones(1), dist.ReduceOp.MAX if rank == 1 else dist.ReduceOp.SUM)


def from_another_root(rank: int) -> None:
    dist.broadcast(torch.ones(1), src=rank % 2)


@pytest.mark.parametrize(
    ("case", "facts"),
    [
        (in_another_order, "ranks [0, 2]: all_reduce SUM of torch.float32; ranks [1]: barrier"),
        (
            of_another_dtype,
            "ranks [0, 2]: all_reduce SUM of torch.float32; ranks [1]: all_reduce SUM of torch.float64",
        ),
        (
            with_another_operator,
            "[0, 2]: all_reduce SUM of torch.float32; ranks [1]: all_reduce MAX of torch.float32",
        ),
        (
            from_another_root,
            "[0, 2]: broadcast of torch.float32 from rank 0; ranks [1]: broadcast of torch.float32 f",
        ),
    ],
)
def test_other_collectives_are_an_error_on_all(
    rank_threads: RankThreads, case: Callable[[int], None], facts: str
) -> None:
    texts = rank_threads.run(lambda rank: told(lambda: case(rank)), 3)
    assert len(set(texts)) == 1
    assert texts[0].startswith("the ranks of a group are in different collectives (")
    assert facts in texts[0]
    assert texts[0].endswith("; every rank has to make the same calls, in the same order, with the same dtype")


def test_a_group_that_not_all_of_its_ranks_use_is_a_time_out_with_places(rank_threads: RankThreads) -> None:
    def one_half(rank: int) -> None:
        group = dist.new_group([0, 1])
        if rank == 0:
            assert isinstance(group, dist.ProcessGroup)
            dist.barrier(group)

    with pytest.raises(
        RankTimeout, match=r"(?s)one_half cannot finish: .*rank 0 stood at.*in barrier.*rank 1 finished"
    ):
        rank_threads.run(one_half, 3)


def test_what_a_backend_would_refuse_is_refused(rank_threads: RankThreads) -> None:
    def refusals() -> list[str]:
        two, three, four = (torch.ones(rows, 2) for rows in (2, 3, 4))
        return [
            told(lambda: dist.all_to_all_single(three, four, [1, 1], [2, 2])),
            told(lambda: dist.all_to_all_single(three, four, [3], [2, 2])),
            told(lambda: dist.all_reduce(two.T)),
            told(lambda: dist.all_gather_single(four, two.double())),
            told(lambda: dist.all_reduce(two, dist.ReduceOp.BXOR)),
            told(lambda: dist.reduce(two, 0)),
            told(lambda: dist.send(two, 1 - dist.get_rank())),
            told(lambda: dist.recv(two, 1 - dist.get_rank())),
        ]

    texts, again = rank_threads.run(refusals, 2)
    assert texts == again
    rules = [
        r"split sizes \[1, 1\] for 3 rows in a group of 2; they have to be one per rank and to sum to the rows",
        r"split sizes \[3\] for 3 rows in a group of 2",
        r"a tensor of shape \(2, 2\) with strides \(1, 2\) in a collective; .* pass x.contiguous\(\)",
        r"dtypes \['torch.float32', 'torch.float64'\] in one all_gather_single of torch.float64; ",
        r"ReduceOp BXOR between ranks that are threads; it has to be SUM, AVG, MAX, MIN, PRODUCT",
        r"reduce between ranks that are threads; they have collectives only: use a RankPool",
        r"send between ranks that are threads",
        r"recv between ranks that are threads",
    ]
    for text, rule in zip(texts, rules, strict=True):
        assert re.match(rule, text), text
