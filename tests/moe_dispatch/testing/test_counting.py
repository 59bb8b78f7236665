"""`counting` sees host syncs where CUDA would wait, and the bytes of every collective."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import counting, run_backward


def reads_item(x: Tensor) -> Any:
    return x.sum().item()


def reads_bool(x: Tensor) -> Any:
    return 1 if x.sum() > 0 else 0


def reads_list(x: Tensor) -> Any:
    return x.tolist()


def reads_copied_list(x: Tensor) -> Any:
    on_host = torch.cat([x, x]).cpu().split(2)
    return [part.tolist() for part in on_host], int(on_host[0][1]), bool(on_host[1].sum() > 0)


def reads_what_was_copied_before(x: Tensor) -> Any:
    return x.cpu().tolist(), x.tolist()


def reads_mask(x: Tensor) -> Any:
    return x[x > 0]


def reads_where(x: Tensor) -> Any:
    return torch.where(x > 0), x.unique()


def reads_to_cpu(x: Tensor) -> Any:
    return x.to("cpu").numpy(), x.to(torch.float64), x.to(x.device)


def reads_repeats(x: Tensor) -> Any:
    number = x.long()
    return x.repeat_interleave(number), x.repeat_interleave(number, output_size=3)


def reads_nothing(x: Tensor) -> Any:
    return torch.nonzero_static(x, size=1), x.argsort(), x[torch.tensor([1, 0])], x.shape[0]


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (reads_item, ["aten::_local_scalar_dense"]),
        (reads_bool, ["aten::_local_scalar_dense"]),
        (reads_list, ["tolist"]),
        (reads_copied_list, ["cpu"]),
        (reads_what_was_copied_before, ["cpu", "tolist"]),
        (reads_mask, ["aten::index.Tensor"]),
        (reads_where, ["aten::nonzero", "aten::_unique2"]),
        (reads_to_cpu, ["to"]),
        (reads_repeats, ["aten::repeat_interleave.Tensor"]),
        (reads_nothing, []),
    ],
)
def test_host_syncs_are_counted_where_cuda_would_wait(read: Callable[[Tensor], Any], found: list[str]) -> None:
    with counting() as counts:
        read(torch.tensor([1.0, 2.0]))
    assert counts.host_syncs == found


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grads[0].cpu().tolist()
        grads[0].sum().item()
        return 2 * grads[0]


def test_host_syncs_inside_a_backward_are_counted() -> None:
    x = torch.ones(2, requires_grad=True)
    out = ReadsInBackward.apply(x)
    assert isinstance(out, Tensor)
    with counting() as counts:
        run_backward(out, torch.ones(2))
    assert counts.host_syncs == ["cpu", "aten::_local_scalar_dense"]
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]


def other_collectives() -> list[int]:
    """Wire bytes of each, on this rank."""
    found, whole, group = [], torch.ones(6), dist.group.WORLD  # 24 bytes
    assert group is not None
    for call in (
        lambda: dist.all_reduce(whole),
        lambda: dist.all_gather([torch.empty(6) for _ in range(3)], whole),
        lambda: dist.all_gather_single(torch.empty(18), whole),
        lambda: dist.reduce_scatter_single(torch.empty(2), whole),
        lambda: dist.all_to_all_single(torch.empty(6), whole),
        lambda: dist.broadcast(whole, src=0),
        lambda: functional.all_to_all_single(whole, [2, 2, 2], [2, 2, 2], group).sum(),
    ):
        with counting() as counts:
            call()
        assert len(counts.collectives) == 1, counts.collectives
        found.append(counts.wire_bytes)
    return found


def test_other_collectives_count_what_a_ring_moves(rank_pool: RankPool) -> None:
    assert rank_pool.run(other_collectives, 3) == [[32, 48, 48, 16, 16, 24, 16]] * 3


def sent_to_a_neighbour() -> tuple[list[str], int]:
    rank, ranks, received = dist.get_rank(), dist.get_world_size(), torch.empty(6)
    with counting() as counts:
        works = [dist.isend(torch.ones(4), (rank + 1) % ranks), dist.irecv(received[:4], (rank - 1) % ranks)]
        for work in works:
            assert work is not None
            work.wait()
    return counts.collectives, counts.wire_bytes


def test_a_send_counts_where_it_is_sent_and_not_where_it_arrives(rank_pool: RankPool) -> None:
    assert rank_pool.run(sent_to_a_neighbour, 3) == [(["c10d::send"], 16)] * 3
