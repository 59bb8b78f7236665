"""Which ranks form which group, drawn and written down; and that every refusal names a mesh that works."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from moe_dispatch import ParallelMesh, build_mesh
from moe_dispatch.testing import RankPool
from tests.support.ranks import refusal

Groups = dict[str, list[list[int]]]


@contextmanager
def pretended_rank(rank: int, ranks: int) -> Iterator[None]:
    """This process as one of many: torch's "fake" backend makes groups and moves nothing."""
    dist.init_process_group("fake", rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def groups_of(mesh: ParallelMesh) -> dict[str, list[int]]:
    """The ranks of each group that this rank is in."""
    members = {name: dist.get_process_group_ranks(mesh.dense.get_group(name)) for name in ("dp", "sp", "tp")}
    return members | {name: dist.get_process_group_ranks(mesh.expert.get_group(name)) for name in ("edp", "ep")}


def all_groups(ranks: int, sizes: dict[str, int]) -> Groups:
    """Every group of every kind, as each of its ranks sees it."""
    seen: dict[str, set[tuple[int, ...]]] = {}
    for rank in range(ranks):
        with pretended_rank(rank, ranks):
            mesh = build_mesh(**sizes, device_type="cpu")  # pyright: ignore[reportArgumentType]
            assert mesh.dense.mesh_dim_names == ("dp", "sp", "tp")
            assert mesh.expert.mesh_dim_names == ("edp", "ep")
            assert mesh.ep_ranks == tuple(groups_of(mesh)["ep"])
            for name, members in groups_of(mesh).items():
                assert rank in members
                seen.setdefault(name, set()).add(tuple(members))
    return {name: sorted(list(members) for members in groups) for name, groups in seen.items()}


def test_all_of_a_cube_of_8() -> None:
    # dense (dp, sp, tp): tp runs fastest      expert (edp, ep): ep runs along tp, then sp, then dp
    #   dp 0:  sp 0 | 0 1    dp 1:  sp 0 | 4 5     edp 0 | 0 1 2 3
    #          sp 1 | 2 3           sp 1 | 6 7     edp 1 | 4 5 6 7
    assert all_groups(8, {"dp": 2, "sp": 2, "tp": 2, "ep": 4}) == {
        "dp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "sp": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "edp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "ep": [[0, 1, 2, 3], [4, 5, 6, 7]],
    }


def test_experts_inside_the_tensor_parallel_ranks() -> None:
    # dp 0 | 0 1      edp 0 | 0 1
    # dp 1 | 2 3      edp 1 | 2 3
    # dp 2 | 4 5      edp 2 | 4 5
    assert all_groups(6, {"dp": 3, "tp": 2, "ep": 2}) == {
        "dp": [[0, 2, 4], [1, 3, 5]],
        "sp": [[0], [1], [2], [3], [4], [5]],
        "tp": [[0, 1], [2, 3], [4, 5]],
        "edp": [[0, 2, 4], [1, 3, 5]],
        "ep": [[0, 1], [2, 3], [4, 5]],
    }


def test_experts_that_divide_the_ranks_and_none_of_their_parts() -> None:
    # dp 0 | 0 1 2    edp 0 | 0 1
    # dp 1 | 3 4 5    edp 1 | 2 3      an ep row crosses from dp 0 to dp 1
    #                 edp 2 | 4 5
    assert all_groups(6, {"dp": 2, "sp": 3, "ep": 2}) == {
        "dp": [[0, 3], [1, 4], [2, 5]],
        "sp": [[0, 1, 2], [3, 4, 5]],
        "tp": [[0], [1], [2], [3], [4], [5]],
        "edp": [[0, 2, 4], [1, 3, 5]],
        "ep": [[0, 1], [2, 3], [4, 5]],
    }


def test_one_rank_needs_no_sizes() -> None:
    assert all_groups(1, {}) == {name: [[0]] for name in ("dp", "sp", "tp", "edp", "ep")}


def layout_and_sums(rank: int) -> tuple[dict[str, list[int]], tuple[int, ...], dict[str, float]]:
    """Experts over data x tensor-parallel ranks, and the sum of the ranks' numbers over each real group."""
    mesh = build_mesh(dp=2, tp=2, ep=4, device_type="cpu")
    sums = {}
    for name, part in (("dp", mesh.dense), ("tp", mesh.dense), ("ep", mesh.expert), ("edp", mesh.expert)):
        number = torch.tensor(10.0**rank)
        dist.all_reduce(number, group=part.get_group(name))
        sums[name] = number.item()
    return groups_of(mesh), mesh.ep_ranks, sums


def test_experts_over_data_and_tensor_parallel_ranks(rank_pool: RankPool) -> None:
    # dp 0 | 0 1      edp 0 | 0 1 2 3
    # dp 1 | 2 3
    for rank, (groups, ep_ranks, sums) in enumerate(rank_pool.run(layout_and_sums, 4)):
        tp, dp = [rank - rank % 2, rank - rank % 2 + 1], [rank % 2, rank % 2 + 2]
        assert groups == {"dp": dp, "sp": [rank], "tp": tp, "edp": [rank], "ep": [0, 1, 2, 3]}
        assert ep_ranks == (0, 1, 2, 3)
        assert sums == {"dp": sum(10.0**r for r in dp), "tp": sum(10.0**r for r in tp), "ep": 1111, "edp": 10.0**rank}


def test_a_mesh_cannot_be_changed() -> None:
    with pretended_rank(0, 1):
        mesh = build_mesh(device_type="cpu")
        with pytest.raises(AttributeError, match="cannot assign to field"):
            mesh.dense = mesh.expert  # pyright: ignore[reportAttributeAccessIssue]


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "sizes", "text", "works"),
    [
        (
            4,
            {"dp": 3, "tp": 2, "ep": 2},
            "dp=3 x sp=1 x tp=2 is 6 ranks, but there are 4; the product has to be 4, e.g. dp=2, sp=1, tp=2",
            {"dp": 2, "sp": 1, "tp": 2, "ep": 2},
        ),
        (
            4,
            {"sp": 3},
            "dp=1 x sp=3 x tp=1 is 3 ranks, but there are 4; the product has to be 4, e.g. dp=4, sp=1, tp=1",
            {"dp": 4, "sp": 1, "tp": 1},
        ),
        (
            8,
            {"sp": 2, "tp": 2},
            "dp=1 x sp=2 x tp=2 is 4 ranks, but there are 8; the product has to be 8, e.g. dp=2, sp=2, tp=2",
            {"dp": 2, "sp": 2, "tp": 2},
        ),
        (
            2,
            {"sp": 2, "tp": 2},
            "dp=1 x sp=2 x tp=2 is 4 ranks, but there are 2; the product has to be 2, e.g. dp=2, sp=1, tp=1",
            {"dp": 2, "sp": 1, "tp": 1},
        ),
        (
            4,
            {"dp": 4, "ep": 3},
            "ep=3 does not divide the 4 ranks of dp=4 x sp=1 x tp=1; use e.g. ep=2",
            {"dp": 4, "ep": 2},
        ),
        (
            4,
            {"dp": 2, "tp": 2, "ep": 8},
            "ep=8 does not divide the 4 ranks of dp=2 x sp=1 x tp=2; use e.g. ep=4",
            {"dp": 2, "tp": 2, "ep": 4},
        ),
        (
            6,
            {"dp": 6, "ep": 4},
            "ep=4 does not divide the 6 ranks of dp=6 x sp=1 x tp=1; use e.g. ep=3",
            {"dp": 6, "ep": 3},
        ),
    ],
)
def test_an_impossible_mesh_is_refused_with_one_that_works(
    ranks: int, sizes: dict[str, int], text: str, works: dict[str, int]
) -> None:
    with pretended_rank(ranks - 1, ranks):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            build_mesh(**sizes, device_type="cpu")  # pyright: ignore[reportArgumentType]
        named = dict(re.findall(r"(\w+)=(\d+)", text.split("e.g.")[1]))
        assert {name: int(size) for name, size in named.items()}.items() <= works.items()
        mesh = build_mesh(**works, device_type="cpu")  # pyright: ignore[reportArgumentType]
        assert mesh.dense.size() == mesh.expert.size() == ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_whatever_the_refusal_names_works(ranks: int) -> None:
    refusals = 0
    with pretended_rank(0, ranks):
        for code in range(4**4):
            sizes = {name: code // 4**i % 4 + 1 for i, name in enumerate(("dp", "sp", "tp", "ep"))}
            possible = sizes["dp"] * sizes["sp"] * sizes["tp"] == ranks and ranks % sizes["ep"] == 0
            if possible:
                continue
            with pytest.raises(ValueError, match=r"e\.g\. ") as caught:
                build_mesh(**sizes, device_type="cpu")  # pyright: ignore[reportArgumentType]
            named = dict(re.findall(r"(\w+)=(\d+)", str(caught.value).split("e.g.")[1]))
            works = sizes | {name: int(size) for name, size in named.items()}
            assert works["dp"] * works["sp"] * works["tp"] == ranks, (sizes, str(caught.value))
            if "ep" in named:
                assert ranks % works["ep"] == 0, (sizes, str(caught.value))
            refusals += 1
    assert refusals > 200


@pytest.mark.parametrize("name", ["dp", "sp", "tp", "ep"])
@pytest.mark.parametrize("size", [0, -2, 1.0, True, "2", None])
def test_a_size_that_is_no_count_is_refused(name: str, size: object) -> None:
    text = f"{name} is {size!r}; it has to be an int of at least 1, and 1 switches it off"
    with pretended_rank(0, 1), pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        build_mesh(**{name: size}, device_type="cpu")  # pyright: ignore[reportArgumentType]


def refused_then_sum(build: Callable[..., ParallelMesh], sizes: dict[str, int]) -> tuple[str, float]:
    """The text, and that the ranks still answer each other afterwards."""
    text = refusal(lambda: build(**sizes, device_type="cpu"))
    number = torch.ones(())
    dist.all_reduce(number)
    return text, number.item()


def test_every_rank_refuses_alike_and_goes_on(rank_pool: RankPool) -> None:
    text = "ep=3 does not divide the 2 ranks of dp=2 x sp=1 x tp=1; use e.g. ep=2"
    assert rank_pool.run(refused_then_sum, 2, build_mesh, {"dp": 2, "ep": 3}) == [(text, 2.0)] * 2
