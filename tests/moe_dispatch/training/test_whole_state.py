"""whole_state_dict and share_of_state_dict: ranks to one process and back, and what does not fit is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_dispatch import GroupedExperts, MoE, Partition, TopKRouter, share_of_state_dict, whole_state_dict
from moe_dispatch.testing import RankPool, RankThreads
from moe_dispatch.testing.counting import counting
from tests.support.dispatch.training import LAYOUTS, Layout
from tests.support.ranks import refusal, world


def state_of(layout: Layout) -> dict[str, Tensor]:
    """Of the model of one process."""
    return layout.whole().state_dict()


def differing(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names that are not in both, or whose values are not equal, bit for bit."""
    names = got.keys() | wanted.keys()
    both = got.keys() & wanted.keys()
    same = {name for name in both if got[name].dtype == wanted[name].dtype and torch.equal(got[name], wanted[name])}
    return sorted(names - same)


def whole_of(layout: Layout) -> dict[str, Tensor]:
    """Of the ranks, after which the model goes on."""
    model = layout.part(layout.mesh().expert.get_group("ep"))
    whole = whole_state_dict(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return whole


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_whole_is_the_state_of_one_process_on_every_rank(rank_threads: RankThreads, layout: Layout) -> None:
    for whole in rank_threads.run(whole_of, layout.ranks, layout):
        assert list(whole) == list(state_of(layout))
        assert differing(whole, state_of(layout)) == []


def loaded(rank: int, layout: Layout, on_meta: bool) -> tuple[list[str], set[int]]:
    """What is not as it should be in a model with other values that took its share of one process; the bytes of
    memory that tensors hold beyond their own."""
    group = layout.mesh().expert.get_group("ep")
    wanted = layout.cut(state_of(layout), group.rank())
    model = Layout(seq=layout.seq, experts=layout.experts, seed=7).part(group)
    whole = state_of(layout)
    model = model.to("meta") if on_meta else model
    model.load_state_dict(share_of_state_dict(whole, model), assign=on_meta)
    tensors = model.moe.get_submodule("experts").state_dict().values()
    beyond = {tensor.untyped_storage().nbytes() - tensor.nbytes for tensor in tensors}
    return differing(model.state_dict(), wanted), beyond


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_takes_its_share(rank_threads: RankThreads, layout: Layout, on_meta: bool) -> None:
    assert rank_threads.run(loaded, layout.ranks, layout, on_meta) == [([], {0})] * layout.ranks


# ---- who keeps it -------------------------------------------------------------------------------------------


def sent_to_the_first(rank: int) -> tuple[list[str], int]:
    """Names that are not as in one process, and bytes that left this rank: 32 and 8 to each peer to compare."""
    layout = LAYOUTS[2]
    model = layout.part(world())
    with counting() as counts:
        whole = whole_state_dict(model, keep=rank == 0)
    return differing(whole, state_of(layout)) if rank == 0 else list(whole), counts.wire_bytes


def test_experts_travel_to_those_that_keep_them_only(rank_pool: RankPool) -> None:
    per_expert = 3 * 8 * 12 * 8
    compared = 2 * (32 + 8)
    assert rank_pool.run(sent_to_the_first, 3) == [([], compared + e * per_expert) for e in (0, 0, 4)]


# ---- experts of other kinds ---------------------------------------------------------------------------------


class ScaledExperts(GroupedExperts):
    """With buffers: of a dtype that backends do not send, one number each, and without numbers."""

    def __init__(self, num_experts: int, first: int) -> None:
        super().__init__(num_experts, 8, 12)
        number_e = torch.arange(first, first + num_experts)
        self.register_buffer("scale_e", number_e.to(torch.float8_e4m3fn))
        self.register_buffer(
            "phase_e23", torch.polar(torch.ones(1), number_e.float())[:, None, None].expand(-1, 2, 3)
        )
        self.register_buffer("nothing_e0", torch.empty(num_experts, 0))


def as_numbers(x: Tensor) -> Tensor:
    """In a dtype that holds those of all."""
    return x if x.is_complex() else x.double()


def with_buffers(rank: int) -> list[tuple[torch.dtype, tuple[int, ...], bool]]:
    partition = Partition((2, 0, 3))
    experts = ScaledExperts(partition.sizes[rank], partition.offsets[rank])
    router = TopKRouter(8, 5, 2, score="softmax")
    model = MoE(router=router, experts=experts, partition=partition, group=world())
    whole, wanted = whole_state_dict(model), ScaledExperts(5, 0)
    for name, value in share_of_state_dict(whole, model).items():
        assert torch.equal(as_numbers(value), as_numbers(model.state_dict()[name])), name
    return [
        (value.dtype, tuple(value.shape), torch.equal(as_numbers(value), as_numbers(wanted.get_buffer(name))))
        for name, value in ((name, whole[f"experts.{name}"]) for name in ("scale_e", "phase_e23", "nothing_e0"))
    ]


def test_buffers_of_any_dtype_and_width_are_gathered(rank_threads: RankThreads) -> None:
    wanted = [(torch.float8_e4m3fn, (5,), True), (torch.complex64, (5, 2, 3), True), (torch.float32, (5, 0), True)]
    assert rank_threads.run(with_buffers, 3) == [wanted] * 3


# ---- what does not fit -----------------------------------------------------------------------------------------


def refused(rank: int, what: str) -> str:
    layout = LAYOUTS[2]
    model = layout.part(world())
    experts = model.moe.get_submodule("experts")
    if what == "not stacked":
        experts.register_buffer("scale_D", torch.ones(4))
    elif what == "width" and rank == 2:
        experts.down_eFD = nn.Parameter(torch.zeros(4, 12, 9, dtype=torch.float64))
    elif what == "meta" and rank == 1:
        model.last.to("meta")
    elif what == "number":
        return refusal(lambda: share_of_state_dict(state_of(LAYOUTS[3]), model))
    return refusal(lambda: whole_state_dict(model))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            "not stacked",  # rank 2 has 4 experts, and sees nothing wrong
            "rank 0: moe.experts.scale_D is (4,) in a layer with 1 experts on this rank; each parameter and buffer "
            "of experts has to have one entry per expert in dimension 0, as those of GroupedExperts; rank 1: "
            "moe.experts.scale_D is (4,) in a layer with 0 experts on this rank; each parameter and buffer of "
            "experts has to have one entry per expert in dimension 0, as those of GroupedExperts",
        ),
        (
            "width",
            "moe.experts.down_eFD is not the same on all ranks (ranks [0, 1]: experts of (12, 8) of torch.float64; "
            "rank [2]: experts of (12, 9) of torch.float64); build experts of one width and dtype on all ranks",
        ),
        (
            "meta",
            "rank 1: last.weight has no values yet; give the model its values first, e.g. on meta "
            "to_empty(device=...) and reset_parameters(), or load_state_dict(..., assign=True)",
        ),
        (
            "number",
            "moe.experts.gate_eDF is (4, 8, 12) in the state dict of the whole model, but its layer has 5 experts in "
            "Partition(sizes=(1, 0, 4)); it has to have that many in dimension 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(rank_threads: RankThreads, what: str, text: str) -> None:
    assert rank_threads.run(refused, 3, what) == [text] * 3


# ---- FSDP2 ---------------------------------------------------------------------------------------------------


def through_fsdp(rank: int, layout: Layout, on_meta: bool) -> list[str]:
    """From one process to ranks with FSDP2, by way of their shares, and back."""
    mesh = layout.mesh()
    ep = mesh.expert.get_group("ep")
    model = Layout(seq=layout.seq, experts=layout.experts, seed=7).part(ep)
    model = model.to("meta") if on_meta else model
    if layout.experts[ep.rank()]:
        fully_shard(model.moe.get_submodule("experts"), mesh=mesh.expert["edp"])
    fully_shard(model, mesh=init_device_mesh("cpu", (layout.ranks,)))
    share = share_of_state_dict(state_of(layout), model)
    assert isinstance(share["first.weight"], DTensor)
    model.load_state_dict(share, assign=on_meta)
    return differing(whole_state_dict(model), state_of(layout))


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_fsdp_takes_and_gives_its_part(rank_pool: RankPool, layout: Layout, on_meta: bool) -> None:
    assert rank_pool.run(through_fsdp, 4, layout, on_meta) == [[]] * 4
