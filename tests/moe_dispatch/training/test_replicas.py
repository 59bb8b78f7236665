"""check_replicated: what should be equal and is not is named, on every rank; what each rank owns is left out."""

import hashlib
import struct

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from moe_dispatch import check_replicated
from moe_dispatch.testing import RankPool, RankThreads
from moe_dispatch.testing.counting import counting
from tests.support.dispatch.training import LAYOUTS
from tests.support.ranks import refusal, world

REMEDY = "; what every rank holds has to be equal: build it from one seed, load it, or broadcast it"
EXPERTS = LAYOUTS[2]


def digest(*numbers: float) -> str:
    """Of float32 numbers."""
    return hashlib.blake2b(struct.pack(f"{len(numbers)}f", *numbers), digest_size=8).hexdigest()


def with_own_experts(rank: int) -> None:
    """Experts, of which each rank has other ones, and counts."""
    model = EXPERTS.part(world())
    model.moe.get_buffer("load_E")[0] = rank
    check_replicated(model, group=world())


def test_what_each_rank_owns_may_differ(rank_threads: RankThreads) -> None:
    rank_threads.run(with_own_experts, 3)


def differing(rank: int, what: str) -> str:
    model = EXPERTS.part(world())
    if rank == 1:
        if what == "parameter":
            with torch.no_grad():
                model.first.bias[:] = 1.0
                model.last.bias[0] += 1e-9
        elif what == "buffer":
            model.moe.get_buffer("router.expert_bias_E")[2] = -0.0
        elif what == "frozen":
            model.last.requires_grad_(False)
        elif what == "name":
            model.last.register_buffer("scale", torch.ones(1), persistent=False)
    if what == "parameter":
        with torch.no_grad():
            model.first.bias.copy_(torch.full((8,), float(rank == 1)))
    return refusal(lambda: check_replicated(model, group=world()))


def test_the_first_that_differs_is_named_with_the_ranks_that_hold_each_value(rank_threads: RankThreads) -> None:
    values = [hashlib.blake2b(struct.pack("8d", *[x] * 8), digest_size=8).hexdigest() for x in (0.0, 1.0)]
    text = (
        f"first.bias is not the same on all ranks (ranks [0, 2]: (8,) of torch.float64, trained, digest {values[0]}; "
        f"rank [1]: (8,) of torch.float64, trained, digest {values[1]}), and 1 more like it" + REMEDY
    )
    assert rank_threads.run(differing, 3, "parameter") == [text] * 3


@pytest.mark.parametrize(
    ("what", "start"),
    [
        ("buffer", "moe.router.expert_bias_E is not the same on all ranks (ranks [0, 2]: (5,) of torch.float64, dig"),
        (
            "frozen",
            "last.weight is not the same on all ranks (ranks [0, 2]: (8, 8) of torch.float64, trained, digest",
        ),
        (
            "name",
            "last.scale is not the same on all ranks (ranks [0, 2]: no such name; rank [1]: (1,) of torch.float",
        ),
    ],
)
def test_buffers_names_and_what_is_frozen_count(rank_threads: RankThreads, what: str, start: str) -> None:
    """A buffer that is -0.0 instead of 0.0, too: bits are compared."""
    texts = rank_threads.run(differing, 3, what)
    assert len(set(texts)) == 1
    assert texts[0].startswith(start)


def of_any_dtype(rank: int, changed: int) -> str:
    """One tensor of each dtype; on rank 1 the last number of one of them is another."""
    model = nn.Module()
    dtypes = (torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64, torch.uint8)
    for i, dtype in enumerate(dtypes):
        tensor = torch.zeros(3, 2)
        if rank == 1 and i == changed:
            tensor[-1, -1] = 1
        model.register_buffer(f"b{i}", tensor.to(dtype).t() if i % 2 else tensor.to(dtype))
    model.register_buffer("empty", torch.zeros(0, 4))
    model.register_buffer("scalar", torch.tensor(2.0))
    model.register_buffer("conjugate", torch.tensor([1j]).conj())
    if changed < 0:
        check_replicated(model, group=world())
        return ""
    return refusal(lambda: check_replicated(model, group=world())).partition(" ")[0]


def test_every_dtype_is_compared(rank_threads: RankThreads) -> None:
    assert rank_threads.run(of_any_dtype, 2, -1) == [""] * 2
    for i in range(6):
        assert rank_threads.run(of_any_dtype, 2, i) == [f"b{i}"] * 2


def without_values(rank: int, how: str) -> str:
    model = nn.Sequential(nn.Linear(2, 2))
    if rank == 1:
        if how == "meta":
            model.to("meta")
        elif how == "lazy":
            model[0] = nn.LazyLinear(2)
        elif how == "sparse":
            model[0].weight = nn.Parameter(torch.eye(2).to_sparse())
    return refusal(lambda: check_replicated(model, group=world()))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_has_no_values_is_told_to_every_rank(rank_threads: RankThreads) -> None:
    text = (
        "rank 1: 0.weight has no values yet; give the model its values first, e.g. on meta to_empty(device=...) and "
        "reset_parameters(), or load_state_dict(..., assign=True)"
    )
    assert rank_threads.run(without_values, 2, "meta") == [text] * 2
    assert rank_threads.run(without_values, 2, "lazy") == [text] * 2
    text = "rank 1: 0.weight is a Parameter of torch.sparse_coo, whose bytes cannot be read; compare it by hand"
    assert rank_threads.run(without_values, 2, "sparse") == [text] * 2


def on_a_mesh(rank: int, how: str) -> str:
    """Linear layers of which rank 1 has other values: a DTensor that is replicated, or sharded by FSDP2."""
    mesh, linear = init_device_mesh("cpu", (2,)), nn.Linear(2, 1, bias=False)
    nn.init.constant_(linear.weight, rank)
    if how == "replicated":
        linear.weight = nn.Parameter(DTensor.from_local(linear.weight.detach(), mesh, [Replicate()]))
        return refusal(lambda: check_replicated(linear, group=world()))
    fully_shard(linear, mesh=mesh)
    check_replicated(linear, group=world())
    return ""


def test_of_dtensors_only_what_is_replicated_has_values_to_compare(rank_pool: RankPool) -> None:
    facts = "(1, 2) of torch.float32, trained, (Replicate(),) on a mesh of (2,), digest"
    text = (
        f"weight is not the same on all ranks (rank [0]: {facts} {digest(0, 0)}; rank [1]: {facts} {digest(1, 1)})"
        + REMEDY
    )
    assert rank_pool.run(on_a_mesh, 2, "replicated") == [text] * 2
    assert rank_pool.run(on_a_mesh, 2, "sharded") == [""] * 2


def cost(rank: int) -> tuple[list[str], int]:
    with counting() as counts:
        check_replicated(EXPERTS.part(world()), group=world())
    return counts.collectives, counts.wire_bytes


def test_ranks_that_agree_exchange_64_bytes(rank_pool: RankPool) -> None:
    assert rank_pool.run(cost, 3) == [(["c10d::alltoall_base_"], 2 * 64)] * 3
