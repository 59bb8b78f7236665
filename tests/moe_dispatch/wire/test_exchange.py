"""exchange_rows: every row arrives where its coordinates say, bit for bit, and its gradient takes the same way back.

A row holds (source rank, destination rank, number in that piece), so that a misplaced row names itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import exchange_rows
from moe_dispatch.testing import RankPool
from tests.support.ranks import refusal, world

Counts = list[list[int]]  # [source][destination]: rows

# The integers of the coordinates, 0 to 100, are exact in all of these.
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
]


def counts_to_try(ranks: int) -> list[Counts]:
    """Uneven, even, one source, one destination, nothing to itself, only to itself, nothing at all."""
    ids = range(ranks)
    return [
        [[(2 * source + 3 * to + 1) % 4 for to in ids] for source in ids],
        [[2 for _ in ids] for _ in ids],
        [[to + 1 if source == ranks - 1 else 0 for to in ids] for source in ids],
        [[source + 1 if to == 0 else 0 for to in ids] for source in ids],
        [[0 if source == to else 3 for to in ids] for source in ids],
        [[5 if source == to else 0 for to in ids] for source in ids],
        [[0 for _ in ids] for _ in ids],
    ]


def rows_between(source: int, to: int, counts: Counts) -> Tensor:
    number_N = torch.arange(counts[source][to])
    return torch.stack([torch.full_like(number_N, source), torch.full_like(number_N, to), number_N], dim=1)


def rows_sent(source: int, counts: Counts) -> Tensor:
    return torch.cat([rows_between(source, to, counts) for to in range(len(counts))])


def rows_received(to: int, counts: Counts) -> Tensor:
    return torch.cat([rows_between(source, to, counts) for source in range(len(counts))])


def splits(rank: int, counts: Counts) -> tuple[list[int], list[int]]:
    return counts[rank], [row[rank] for row in counts]


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and got.equal(wanted)


# ---- cases: what the ranks run -------------------------------------------------------------------------


def strided(rows_SC: Tensor) -> dict[str, Tensor]:
    """The same rows in other memory."""
    return {
        "contiguous": rows_SC,
        "transposed": rows_SC.T.contiguous().T,
        "every other column": torch.stack([rows_SC, rows_SC + 1], dim=-1)[..., 0],
        "every other row": torch.stack([rows_SC, rows_SC + 1], dim=1).flatten(0, 1)[::2],
        "offset": torch.cat([rows_SC[:1] + 1, rows_SC])[len(rows_SC[:1]) :],
    }


def exchange_coordinates(rank: int, group: dist.ProcessGroup | None = None) -> list[str]:
    """What went wrong, over all counts, dtypes, memory layouts and row shapes."""
    group = group or world()
    failures = []
    for counts, dtype in product(counts_to_try(group.size()), DTYPES):
        sent, received = splits(group.rank(), counts)
        wanted_RC = rows_received(group.rank(), counts).to(dtype)
        for name, rows_SC in strided(rows_sent(group.rank(), counts).to(dtype)).items():
            if not same_bits(exchange_rows(rows_SC, sent, received, group), wanted_RC):
                failures.append(f"{counts} {dtype} {name}")
    counts = counts_to_try(group.size())[0]
    sent, received = splits(group.rank(), counts)
    rows_SC, wanted_RC = rows_sent(group.rank(), counts), rows_received(group.rank(), counts)
    for shape in ((3,), (3, 1), (1, 3, 1)):
        got = exchange_rows(rows_SC.view(-1, *shape), sent, received, group)
        if not same_bits(got, wanted_RC.view(-1, *shape)):
            failures.append(f"rows of shape {shape}")
    if not same_bits(exchange_rows(rows_SC[:, 2], sent, received, group), wanted_RC[:, 2]):
        failures.append("rows of shape ()")
    return failures


def exchange_in_pairs(rank: int) -> list[str]:
    """Ranks 0 and 2 exchange, and 1 and 3, at the same time."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    mine = pairs[rank % 2]
    assert isinstance(mine, dist.ProcessGroup)
    failures = exchange_coordinates(rank, mine)
    dist.destroy_process_group(mine)
    return failures


def dense_map(counts: Counts) -> Tensor:
    """E, the whole group's exchange as a matrix: all received rows = E @ all sent rows."""
    ranks = range(len(counts))
    sent = [tuple(row) for rank in ranks for row in rows_sent(rank, counts).tolist()]
    received = [tuple(row) for rank in ranks for row in rows_received(rank, counts).tolist()]
    e_RS = torch.zeros(len(received), len(sent), dtype=torch.float64)
    for i, row in enumerate(received):
        e_RS[i, sent.index(row)] = 1.0
    return e_RS


def gradients(rank: int) -> list[str]:
    """Compare output, gradient and the gradient's gradient with the dense map and its transpose."""
    failures = []
    for counts in counts_to_try(world().size()):
        sent, received = splits(rank, counts)
        all_sent, all_received = [sum(row) for row in counts], [sum(column) for column in zip(*counts, strict=True)]
        e_RS = dense_map(counts)
        rows_SD = torch.randn(sum(all_sent), 5, dtype=torch.float64)  # the same on every rank
        grad_RD = torch.randn(sum(all_received), 5, dtype=torch.float64)
        mine_SD = rows_SD.split(all_sent)[rank].clone().requires_grad_()
        back_RD = grad_RD.split(all_received)[rank].clone().requires_grad_()
        out_RD = exchange_rows(mine_SD, sent, received, world())
        (grad_SD,) = torch.autograd.grad(out_RD, mine_SD, back_RD, create_graph=True)
        (again_RD,) = torch.autograd.grad(grad_SD, back_RD, mine_SD.detach())
        wanted_RD = (e_RS @ rows_SD).split(all_received)[rank]
        pairs = {
            "output": (out_RD, wanted_RD),
            "gradient": (grad_SD, (e_RS.T @ grad_RD).split(all_sent)[rank]),
            "gradient of the gradient": (again_RD, wanted_RD),
        }
        failures += [f"{counts} {name}" for name, (got, wanted) in pairs.items() if not same_bits(got, wanted)]
    return failures


def backward_without_rows(rank: int) -> tuple[bool, list[float]]:
    """Rank 0 has no rows at all; in backward it still takes part, and later collectives find the ranks in step."""
    counts = [[0 if 0 in (source, to) else 2 for to in range(world().size())] for source in range(world().size())]
    sent, received = splits(rank, counts)
    rows_SD = torch.ones(sum(sent), 3, requires_grad=True)
    out_RD = exchange_rows(rows_SD, sent, received, world())
    out_RD.sum().backward()
    total = torch.ones(())
    dist.all_reduce(total)
    assert rows_SD.grad is not None
    return out_RD.requires_grad, [rows_SD.grad.sum().item(), total.item()]


def strided_gradient(rank: int) -> list[str]:
    """The gradient that arrives is expanded (from a sum) or transposed."""
    counts = counts_to_try(world().size())[0]
    sent, received = splits(rank, counts)
    rows_SD = torch.ones(sum(sent), 3, requires_grad=True)
    out_RD = exchange_rows(rows_SD, sent, received, world())
    coded_RD = rows_received(rank, counts).to(out_RD.dtype)
    (expanded_SD,) = torch.autograd.grad(out_RD.sum(), rows_SD, retain_graph=True)
    (transposed_SD,) = torch.autograd.grad(out_RD, rows_SD, coded_RD.T.contiguous().T)
    failures = [] if same_bits(expanded_SD, torch.ones_like(rows_SD)) else ["expanded"]
    return (
        failures if same_bits(transposed_SD, rows_sent(rank, counts).to(out_RD.dtype)) else [*failures, "transposed"]
    )


@contextmanager
def no_collective() -> Iterator[None]:
    refuse = AssertionError("a collective was called")
    with mock.patch.object(dist, "all_to_all_single", side_effect=refuse):
        yield


def exchange_alone(rank: int) -> list[str]:
    """In a group of one rank, that of a single process and one out of several."""
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    assert isinstance(alone, dist.ProcessGroup)
    with no_collective():
        rows_SD = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        out_SD = exchange_rows(rows_SD * 1, [4], [4], alone)
        (grad_SD,) = torch.autograd.grad(out_SD, rows_SD, rows_SD.detach() * 2)
        none_SD = exchange_rows(rows_SD[:0], [0], [0], alone)
    dist.destroy_process_group(alone)
    checks = {
        "output": same_bits(out_SD, rows_SD),
        "gradient": same_bits(grad_SD, rows_SD.detach() * 2),
        "no rows": none_SD.shape == (0, 3) and none_SD.requires_grad,
    }
    return [name for name, right in checks.items() if not right]


def wrong_calls() -> dict[str, str]:
    """The text of each refusal; no collective is called, so one rank may call alone."""
    rows_SD = torch.zeros(3, 2)
    calls: dict[str, Callable[[], Tensor]] = {
        "no group": lambda: exchange_rows(rows_SD, [1, 2], [1, 2], None),  # type: ignore[arg-type]
        "sent of another length": lambda: exchange_rows(rows_SD, [3], [1, 2], world()),
        "received of another length": lambda: exchange_rows(rows_SD, [1, 2], [3], world()),
        "negative sent": lambda: exchange_rows(rows_SD, [-1, 4], [1, 2], world()),
        "negative received": lambda: exchange_rows(rows_SD, [1, 2], [-1, 2], world()),
        "sum": lambda: exchange_rows(rows_SD, [1, 1], [1, 2], world()),
        "no counts": lambda: exchange_rows(rows_SD, [], [], world()),
    }
    with no_collective():
        return {name: refusal(call) for name, call in calls.items()}


def wrong_calls_alone() -> str:
    with no_collective():
        return refusal(lambda: exchange_rows(torch.zeros(3, 2), [3], [2], world()))


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_arrive_in_rank_order_bit_for_bit(rank_pool: RankPool, ranks: int) -> None:
    assert rank_pool.run(exchange_coordinates, ranks) == [[]] * ranks


def test_a_subgroup_counts_its_own_ranks(rank_pool: RankPool) -> None:
    assert rank_pool.run(exchange_in_pairs, 4) == [[]] * 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_backward_is_the_transposed_map(rank_pool: RankPool, ranks: int) -> None:
    assert rank_pool.run(gradients, ranks) == [[]] * ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_without_rows_owes_the_backward_exchange(rank_pool: RankPool, ranks: int) -> None:
    sums = [0.0] + [6.0 * (ranks - 1)] * (ranks - 1)
    assert rank_pool.run(backward_without_rows, ranks) == [(True, [total, float(ranks)]) for total in sums]


def test_gradients_have_any_strides(rank_pool: RankPool) -> None:
    assert rank_pool.run(strided_gradient, 3) == [[]] * 3


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_group_of_one_communicates_nothing(rank_pool: RankPool, ranks: int) -> None:
    assert rank_pool.run(exchange_alone, ranks) == [[]] * ranks


ONE_PIECE = (
    "but the group has 2; they have to be equal, one piece per rank in the group's rank order (for a group that is "
    "part of a mesh: sharding.select(ranks))"
)
ONE_COUNT = "both need one count >= 0 per rank, and sent has to sum to the number of rows"


def test_wrong_arguments_are_refused_before_the_collective(rank_pool: RankPool) -> None:
    texts = {
        "no group": "group is None; pass the process group explicitly, e.g. torch.distributed.group.WORLD once "
        "init_process_group has run, or device_mesh.get_group()",
        "sent of another length": f"sent = (3,) describes 1 ranks, {ONE_PIECE}",
        "received of another length": f"3 rows with sent = (1, 2) and received = (3,); {ONE_COUNT}",
        "negative sent": f"3 rows with sent = (-1, 4) and received = (1, 2); {ONE_COUNT}",
        "negative received": f"3 rows with sent = (1, 2) and received = (-1, 2); {ONE_COUNT}",
        "sum": f"3 rows with sent = (1, 1) and received = (1, 2); {ONE_COUNT}",
        "no counts": f"sent = () describes 0 ranks, {ONE_PIECE}",
    }
    assert rank_pool.run(wrong_calls, 2) == [texts] * 2
    assert rank_pool.run(wrong_calls_alone, 1) == [
        "sent = (3,) and received = (2,) in a group of one rank; they have to be equal"
    ]
