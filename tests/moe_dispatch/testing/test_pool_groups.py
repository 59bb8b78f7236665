"""Groups that a case makes go with it, however it made them, and leave no thread of the backend behind."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moe_dispatch import ParallelMesh, build_mesh, exchange_rows
from moe_dispatch.testing import RankPool
from tests.support.dispatch.rank_cases import sum_over_ranks

KEPT: list[object] = []  # what a careless test leaves in a module: here it is on purpose


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def groups_and_mesh(rank: int) -> tuple[float, int]:
    """A sum of 1, 10, 100 over a group, and another over a part of a mesh."""
    group, x = dist.new_group([1, 2]), torch.tensor(10.0**rank)
    if rank:
        assert isinstance(group, dist.ProcessGroup)
        dist.all_reduce(x, group=group)
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("outer", "inner"))
    dist.all_reduce(x, group=mesh.get_group("inner"))
    loop: list[object] = [group, mesh]
    loop.append(loop)  # garbage that no count of references frees
    return x.item(), num_threads()


def group_of_one_rank(rank: int) -> None:
    if rank == 1:
        dist.new_group([1])


def group_of_one_rank_that_is_gone(rank: int) -> None:
    if rank == 1:
        group = dist.new_group([1])
        assert isinstance(group, dist.ProcessGroup)
        dist.destroy_process_group(group)


def group_that_its_members_name(rank: int) -> float:
    x = torch.ones(1)
    if rank:
        group = dist.new_group([1, 2], use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        dist.all_reduce(x, group=group)
    return x.item()


def collective_that_never_comes(rank: int) -> None:
    group = dist.new_group([0, 1, 2])
    if rank == 0:
        assert isinstance(group, dist.ProcessGroup)
        dist.all_reduce(torch.ones(1), group=group, async_op=True)


def graph_through_a_mesh(mesh: ParallelMesh) -> Tensor:
    x = torch.ones(2, requires_grad=True)
    return exchange_rows(x, (1, 1), (1, 1), mesh.expert.get_group("ep"))


def keep_mesh_and_graph(rank: int) -> None:
    """A graph without its backward, and the mesh that it holds."""
    mesh = build_mesh(dp=2, sp=2, ep=2, device_type="cpu")
    KEPT[:] = [mesh, graph_through_a_mesh(mesh)]


def make_them_again(rank: int) -> list[float]:
    """Beside those that are kept, which then go."""
    assert len(KEPT) == 2
    mesh, x = build_mesh(dp=2, sp=2, ep=2, device_type="cpu"), torch.tensor(10.0**rank)
    dist.all_reduce(x, group=mesh.dense.get_group("sp"))
    y = graph_through_a_mesh(mesh)
    y.sum().backward()
    KEPT.clear()
    return [x.item(), *y.tolist()]


def destroy_the_default_group(rank: int) -> None:
    dist.barrier()
    dist.destroy_process_group()


def test_threads_of_a_rank_are_flat_over_20_cases_that_make_groups(rank_pool: RankPool) -> None:
    before = rank_pool.run(num_threads, 3)
    for _ in range(20):
        results = rank_pool.run(groups_and_mesh, 3)
        assert [x for x, _ in results] == [221.0, 221.0, 221.0]  # 1 + 110 + 110
        assert all(during > threads for (_, during), threads in zip(results, before, strict=True))
    assert rank_pool.run(num_threads, 3) == before
    assert rank_pool.run(sum_over_ranks, 3, torch.ones(1)) == [torch.tensor([111.0])] * 3  # the default group stays


@pytest.mark.parametrize(
    "case",
    [
        group_of_one_rank,
        group_of_one_rank_that_is_gone,
        group_that_its_members_name,
        collective_that_never_comes,
    ],
)
def test_ranks_that_made_groups_in_their_own_way_agree_again_in_the_next_case(
    rank_pool: RankPool, case: Callable[[int], object]
) -> None:
    before, pids = rank_pool.run(num_threads, 3), rank_pool.run(os.getpid, 3)
    for _ in range(3):
        rank_pool.run(case, 3)
        assert [x for x, _ in rank_pool.run(groups_and_mesh, 3)] == [221.0] * 3
    assert rank_pool.run(group_that_its_members_name, 3) == [1.0, 2.0, 2.0]
    assert rank_pool.run(num_threads, 3) == before
    assert rank_pool.run(os.getpid, 3) == pids  # none had to be replaced


def test_meshes_and_graphs_that_a_case_left_do_not_break_the_next(rank_pool: RankPool) -> None:
    before, pids = rank_pool.run(num_threads, 4), rank_pool.run(os.getpid, 4)
    for _ in range(3):
        rank_pool.run(keep_mesh_and_graph, 4)
        sums = [11.0, 11.0, 1100.0, 1100.0]
        assert rank_pool.run(make_them_again, 4) == [[x, 1.0, 1.0] for x in sums]
    assert rank_pool.run(num_threads, 4) == before
    assert rank_pool.run(os.getpid, 4) == pids


def test_a_case_may_destroy_the_default_group() -> None:
    with RankPool() as pool:
        pool.run(destroy_the_default_group, 1)
        assert pool.run(dist.is_initialized, 1) == [False]
