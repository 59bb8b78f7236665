"""torchtitan's MoE block over ranks is torchtitan's MoE block on one process."""

import copy
import importlib
from typing import Any

import pytest
import torch
import torchtitan
from spmd_types.checker import typecheck
from torch import nn
from torchtitan.config import apply_overrides
from torchtitan.config.override import OverrideConfig
from torchtitan.models.common.token_dispatcher import (
    AllToAllTokenDispatcher,
    BaseEPTokenDispatcher,
    TorchAOTokenDispatcher,
)

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.integrations.torchtitan import MoEDispatchTokenDispatcher, interface, known_tokens
from moe_dispatch.testing import RankThreads
from tests.support.ranks import refusal
from tests.support.torchtitan.block import CHOICES, EXPERTS, Routed, RoutedOnly, config_of, new_block
from tests.support.torchtitan.runs import (
    Case,
    Run,
    block_over_ranks,
    off_by,
    on_one_process,
    over_ranks,
    together,
)
from tests.support.torchtitan.strict import without_casts

# torchtitan asks for autocast to float32, which torch's CPU has not.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning")
SPLITS = ((8, 8, 8, 8), (17, 1, 10, 5), (20, 0, 13, 0))
STRICT = 1e-12


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("ep", [4, 2])
@pytest.mark.parametrize("lengths", SPLITS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_block_is_that_of_one_process(
    rank_threads: RankThreads, batch: int, lengths: tuple[int, ...], ep: int, is_known: bool
) -> None:
    case = Case(batch, lengths, ep, torch.float64, is_known)
    with without_casts(case.dtype):
        found = together(rank_threads.run(over_ranks, 4, case), case)
        assert off_by(found, on_one_process(case)) <= STRICT


def by_given_choices(rank: int, case: Case) -> Run:
    routed = Routed.drawn(case.batch, sum(case.lengths))
    mine = [case.whole.shard(x, rank).contiguous() for x in (routed.score_BLK, routed.expert_BLK)]
    return over_ranks(rank, case, lambda block: RoutedOnly(block, Routed(*mine)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("lengths", "is_zigzag"), [*((lengths, False) for lengths in SPLITS), (SPLITS[0], True)])
def test_gradients_of_experts_have_the_bits_of_one_process(
    rank_threads: RankThreads, lengths: tuple[int, ...], is_zigzag: bool, dtype: torch.dtype
) -> None:
    case = Case(3, lengths, 4, dtype, is_zigzag=is_zigzag)
    routed = Routed.drawn(case.batch, sum(lengths))
    with without_casts(dtype):
        found = together(rank_threads.run(by_given_choices, 4, case), case)
        wanted = on_one_process(case, lambda block: RoutedOnly(block, routed))
    assert all(map(torch.equal, found.experts, wanted.experts))
    assert len(found.experts) == 3


def one_expert_for_all(rank: int) -> Run:
    """All rows go to rank 0: the other's experts get none, and one rank has no tokens."""
    case = Case(1, (5, 0), 2, torch.bfloat16)
    length = case.lengths[rank]
    ids = torch.tensor([0, 1, 2], device="cpu").expand(1, length, CHOICES).contiguous()
    return over_ranks(rank, case, lambda block: RoutedOnly(block, Routed(torch.ones(1, length, CHOICES), ids)))


def test_a_rank_without_rows_and_tokens_takes_part_in_backward(rank_threads: RankThreads) -> None:
    busy, idle = rank_threads.run(one_expert_for_all, 2)
    assert all(float(gradient.abs().sum()) > 0 for gradient in busy.experts)
    assert [float(gradient.abs().sum()) for gradient in idle.experts] == [0.0] * 3


class LazyExperts(nn.Module):
    """They return what nothing led to where there are no rows."""

    num_experts = EXPERTS

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_RD: torch.Tensor, count_e: torch.Tensor) -> torch.Tensor:
        return self.experts(x_RD, count_e) if len(x_RD) else torch.zeros_like(x_RD)


def lazy(rank: int) -> bool:
    """Experts alone learn, and those of rank 1 get no rows."""
    case = Case(1, (5, 2), 2, torch.bfloat16)
    block, _ = block_over_ranks(case)
    experts = block.routed_experts.inner_experts
    block.routed_experts.inner_experts = LazyExperts(experts)  # type: ignore[assignment]
    x_BlD = case.whole.shard(case.grid()[0], rank).contiguous()
    ids = torch.tensor([0, 1, 2], device="cpu").expand(1, case.lengths[rank], CHOICES).contiguous()
    routed = Routed(torch.ones_like(ids, dtype=torch.float32), ids)
    RoutedOnly(block, routed)(x_BlD).square().sum().backward()
    return any(w.grad is not None for w in experts.parameters())


def test_experts_that_skip_their_work_leave_nobody_waiting(rank_threads: RankThreads) -> None:
    assert rank_threads.run(lazy, 2) == [True, False]


def test_without_a_mesh_it_is_the_local_dispatcher() -> None:
    case = Case(2, (7,), 1, torch.bfloat16)
    ours = new_block(MoEDispatchTokenDispatcher, case.dtype)
    wanted = on_one_process(case)
    assert torch.equal(ours(case.grid()[0]), wanted.y_BLD)


def refusals(rank: int) -> list[str]:
    case = Case(2, (3, 1), 2, torch.bfloat16)
    block, of_group = block_over_ranks(case)
    dispatcher = block.routed_experts.token_dispatcher
    x_BlD = case.whole.shard(case.grid()[0], rank).contiguous()
    texts = []
    with known_tokens(of_group, block):
        texts.append(refusal(lambda: block(x_BlD[:, :-1] if rank else x_BlD)))
        texts.append(refusal(lambda: block(x_BlD * float("nan") if rank else x_BlD)))
        block(x_BlD)  # the group is as it was
    assert dispatcher._known is None
    texts.append(refusal(lambda: known_tokens(of_group, nn.Linear(1, 1)).__enter__()))
    sequence_first = TokenSharding(batch=2, seq=Partition((3, 1)), order="LB")
    texts.append(refusal(lambda: known_tokens(sequence_first, block).__enter__()))
    of_others = TokenSharding(batch=2, seq=Partition((3, 1, 0)))
    with known_tokens(of_others, block):
        texts.append(refusal(lambda: block(x_BlD)))
    with typecheck():
        texts.append(refusal(lambda: dispatcher.dispatch(x_BlD[0], x_BlD[0, :, :3], x_BlD[0, :, :3].long(), x_BlD)))
    return texts


def test_mistakes_are_told_on_every_rank(rank_threads: RankThreads) -> None:
    first, second = rank_threads.run(refusals, 2)
    assert first == second
    wanted = (
        "rank 1: 0 tokens came to the dispatcher, but the sharding that known_tokens was given has 2 x 1 here",
        "rank 1: the weight at local token 0, choice 0 is NaN",
        "no MoEDispatchTokenDispatcher in these models; known_tokens needs order 'BL'",
        "a sharding in order 'LB'; known_tokens needs order 'BL'",
        "3",
        "SPMD type checking is on, and cannot see the exchange",
    )
    for text, part in zip(first, wanted, strict=True):
        assert part in text


# A pipeline runs each stage once on tensors that nobody filled, by this function.
PIPELINE = {"__name__": "torch.distributed.pipelining.stage"}
exec("def _forward_metadata_inference(call):\n    return call()", PIPELINE)


def learns_shapes(rank: int) -> tuple[int, ...]:
    block, _ = block_over_ranks(Case(1, (2, 2), 2, torch.bfloat16))
    x_BlD = torch.full((1, 2, 16), float("nan"), dtype=torch.bfloat16)
    return tuple(PIPELINE["_forward_metadata_inference"](lambda: block(x_BlD)).shape)  # type: ignore[operator]


def test_a_pipeline_may_learn_shapes_from_nan(rank_threads: RankThreads) -> None:
    assert rank_threads.run(learns_shapes, 2) == [(1, 2, 16)] * 2


def copied(rank: int) -> bool:
    case = Case(1, (2, 2), 2, torch.bfloat16)
    block, _ = block_over_ranks(case)
    x_BlD = case.whole.shard(case.grid()[0], rank).contiguous()
    return torch.equal(copy.deepcopy(block)(x_BlD), block(x_BlD))


def test_a_copy_is_on_the_same_mesh(rank_threads: RankThreads) -> None:
    assert rank_threads.run(copied, 2) == [True, True]


def test_the_override_puts_it_into_every_layer_with_the_standard_dispatcher() -> None:
    named = OverrideConfig(imports=["moe_dispatch.integrations.torchtitan.overrides.token_dispatcher"])
    config = config_of(AllToAllTokenDispatcher).routed_experts
    apply_overrides(named, config)
    built = config.build().token_dispatcher
    assert isinstance(built, MoEDispatchTokenDispatcher)
    assert (built.num_experts, built.top_k) == (EXPERTS, CHOICES)


def older_dispatch(self: object, x: object, scores: object, ids: object) -> None: ...


@pytest.mark.parametrize("difference", ["other arguments", "other names"])
def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch, difference: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(torchtitan, "__version__", "0.2.1")
        if difference == "other arguments":
            patched.setattr(BaseEPTokenDispatcher, "dispatch", older_dispatch)
        else:
            patched.delattr("torchtitan.models.common.token_dispatcher.LocalTokenDispatcher")
        with pytest.raises(ImportError) as error:
            importlib.reload(interface)
    importlib.reload(interface)
    assert str(error.value) == (
        "torchtitan 0.2.1 has no slot for token dispatchers that moe_dispatch knows; versions 0.3 up to, but not "
        'including, 0.4, work: pip install "torchtitan>=0.3,<0.4"'
    )


def test_what_torchtitan_itself_lacks_is_not_called_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(importlib.sys.modules, "spmd_types", None)  # type: ignore[attr-defined]
        with pytest.raises(ModuleNotFoundError, match="spmd_types"):
            importlib.reload(interface)
    importlib.reload(interface)


def test_the_override_leaves_dispatchers_that_pad_rows_alone() -> None:
    config = config_of(AllToAllTokenDispatcher).routed_experts
    config.token_dispatcher = TorchAOTokenDispatcher.Config(num_experts=EXPERTS, top_k=CHOICES, pad_multiple=16)
    named = OverrideConfig(imports=["moe_dispatch.integrations.torchtitan.overrides.token_dispatcher"])
    assert apply_overrides(named, config) == []
