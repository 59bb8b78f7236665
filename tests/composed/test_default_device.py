"""Every operation works where its inputs are, whatever the default device is. ``torch.device("meta")`` as the default
shows each tensor that is made elsewhere: it holds nothing."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import (
    Partition,
    RoutingRecord,
    StaticSizes,
    TokenSharding,
    agree,
    check_replicated,
    clip_grad_norm,
    combine,
    dispatch,
    exchange_rows,
    gather_sharding,
    gather_tokens,
    place_tokens,
    plan_dispatch,
    plan_static,
    record_routing,
    replay_routing,
    sequence_balance_loss,
    share_of_state_dict,
    sum_gradients,
    whole_state_dict,
)
from moe_dispatch.reference import reference_balance_loss
from moe_dispatch.testing import RankThreads
from sp_attention import (
    Batch,
    ShardedBatch,
    count_targets,
    flex_attend,
    gather_outputs,
    heads_from_tokens,
    mean_cross_entropy,
    mean_loss,
    shard_batch,
    shift_labels,
    tokens_from_heads,
    ulysses_attention,
)
from sp_attention.reference import reference_attention
from tests.support.attention.batches import GOOD, sharded, sharding_of, tokens
from tests.support.dispatch.moe import Case, outcome, pull
from tests.support.dispatch.plans import KINDS, planner_of, planning
from tests.support.ranks import refusal, world
from tests.support.tensors import leaf

Inside = AbstractContextManager[Any]
CPU = torch.device("cpu")
CASE = Case(seq=(3, 0, 1, 2), experts=(2, 1, 0, 3))
SEQ = Partition((2, 1, 0, 2))
SHARDING = TokenSharding(batch=2, seq=SEQ, order="LB")
PACKED: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 2, 4]), "cu_seqlens_padded": torch.tensor([0, 3, 5])}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- what the ranks run; inputs are made outside of ``inside`` ------------------------------------------


def layer(rank: int, inside: Inside, kind: Any) -> list[Any]:
    x_BlD, pull_BlD, pull_BlE = CASE.shards(rank)
    with planner_of(kind, rank, CASE.sizes) as planner:
        moe = CASE.layer(rank, planner=planner)
        with inside:
            results = moe(x_BlD, sharding=CASE.sharding)
            balance = sequence_balance_loss(results[1], top_k=2, sharding=CASE.sharding, group=world())
            (pull(results, pull_BlD, pull_BlE) + balance).backward()
            moe.check()
        found = outcome(moe, x_BlD, results)
        with inside:
            moe.update_bias(0.1, world())
    return [found.y_BlD, found.dx_BlD, *found.gradients.values(), *found.load, balance, moe.router.expert_bias_E]


def training(rank: int, inside: Inside) -> list[Any]:
    moe, x_BlD = CASE.layer(rank), CASE.shards(rank)[0]
    moe(x_BlD, sharding=CASE.sharding)[0].square().sum().backward()
    with inside:
        check_replicated(moe, group=world())
        sum_gradients(moe, group=world())
        norm = clip_grad_norm(moe, 0.5)
        whole = whole_state_dict(moe)
        share = share_of_state_dict(whole, moe)
    return [norm, *(weight.grad for weight in moe.parameters()), *whole.values(), *share.values()]


def routing(rank: int, inside: Inside) -> list[Any]:
    moe, x_BlD = CASE.layer(rank), CASE.shards(rank)[0]
    with inside:
        with record_routing(moe) as record:
            moe(x_BlD, sharding=CASE.sharding)
        whole = record.gather(world())
        with replay_routing(moe, whole):
            y_BlD, _ = moe(x_BlD, sharding=CASE.sharding)
        made = RoutingRecord.of_experts({"": [CASE.sharding.tokens(0).view(2, 3, 1)]}, num_experts=20)
    parts = [x for one in (record, whole, made) for x in one.layers[""]]
    return [y_BlD, *(x.token_N for x in parts), *(x.expert_NK for x in parts)]


def rows(rank: int, inside: Inside, kind: Any) -> list[Any]:
    x_BlD = CASE.shards(rank)[0]
    expert_BlK = (torch.arange(x_BlD.shape[:2].numel() * 3) % 6).view(*x_BlD.shape[:2], 3)
    weight_BlK = leaf((expert_BlK + 1).double())
    terms: dict[str, Any] = {"dim": x_BlD.shape[2], "sharding": CASE.sharding, "experts": CASE.partition}
    sizes = StaticSizes(rows_per_pair=12, rows=50)
    with planning(kind, rank, sizes) as plan_of, inside:
        plan = plan_of(expert_BlK, **terms)
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        y_BlD = combine(x_MD, plan, weight_M)
        y_BlD.sum().backward()
    return [y_BlD, x_BlD.grad, weight_BlK.grad, plan.token_of_row_M]


def regions(rank: int, inside: Inside) -> list[Any]:
    x_BlD = leaf(SHARDING.shard(drawn(5, 2, 3), rank))
    with inside:
        whole = gather_tokens(x_BlD, sharding=SHARDING, group=world())
        placed = place_tokens(x_BlD, sharding=SHARDING, rank=rank)
        moved = exchange_rows(x_BlD.new_ones(4, 2), (1,) * 4, (1,) * 4, world())
        (whole.square().sum() + placed.square().sum()).backward()
        asked = gather_sharding(rank, device=CPU, group=world())
        tokens_of = [SHARDING.tokens(rank), SHARDING.positions(rank), SHARDING.rows(rank)]
        tokens_of += SHARDING.locate(tokens_of[0])
    return [whole, placed, moved, x_BlD.grad, f"{asked}", *tokens_of]


def attention(rank: int, inside: Inside, options: Mapping[str, Any]) -> list[Any]:
    torch.manual_seed(3)  # of dropout
    batch = 1 if "cu_seqlens" in options else 2
    sharding = TokenSharding(batch=batch, seq=SEQ)
    q, k, v = (leaf(sharding.shard(drawn(batch, 5, heads, 4, seed=heads), rank)) for heads in (6, 3, 3))
    with inside:
        out_BlNH = ulysses_attention(q, k, v, sharding=sharding, group=world(), **options)
        out_BlNH.square().sum().backward()
    return [out_BlNH, q.grad, k.grad, v.grad]


def exchanges(rank: int, inside: Inside) -> list[Any]:
    x_BlNH, heads = SHARDING.shard(drawn(5, 2, 6, 4), rank), Partition((2, 3, 0, 1))
    with inside:
        x_BLnH = heads_from_tokens(x_BlNH, sharding=SHARDING, heads=heads, group=world())
        back_BlNH = tokens_from_heads(x_BLnH, sharding=SHARDING, heads=heads, group=world())
    return [x_BLnH, back_BlNH]


def batches(rank: int, inside: Inside, options: Mapping[str, Any]) -> list[Any]:
    rows = 1 if "cu_seqlens" in options else 2
    batch = Batch(token_BL=tokens(rows, 5), fields={"x": drawn(rows, 5)}, **options)
    logits_BlV = leaf(drawn(rows, SEQ.sizes[rank], 300))
    with inside:
        labels_BL = shift_labels(batch.token_BL, **options)
        part = sharded(rank, batch, TokenSharding(batch=rows, seq=SEQ))
        whole = gather_outputs(logits_BlV, batch=part, group=world())
        num_targets = count_targets(part.target_Bl, group=world())
        loss = mean_cross_entropy(logits_BlV, part.target_Bl, group=world(), num_targets=num_targets)
        other = mean_loss(logits_BlV[..., 0], part.target_Bl, group=world())
        (loss.share + other.share).backward()
        chunks = [chunk.token_Bc for chunk in part.chunks(1)]
    return [labels_BL, *tensors_of(part), whole, num_targets, loss.whole, other.whole, logits_BlV.grad, *chunks]


def tensors_of(part: ShardedBatch) -> list[Tensor]:
    given = (getattr(part, name) for name in ("token_Bl", "target_Bl", "position_Bl", "real_Bl", "key_padding_mask"))
    return [x for x in (*given, part.attn_mask, part.cu_seqlens, *part.fields.values()) if x is not None]


def references(rank: int, inside: Inside) -> list[Any]:
    q, k, v = (leaf(drawn(1, 5, heads, 4, seed=heads)) for heads in (4, 2, 2))
    x_BLD = CASE.inputs()[0]
    reference = CASE.reference()
    with inside:
        y_BLD, scores_BLE = reference(x_BLD)
        balance = reference_balance_loss(scores_BLE, 2)
        out_BLNH = reference_attention(q, k, v, is_causal=True, **PACKED)
        out_BLNH.sum().backward()
    return [y_BLD, balance, out_BLNH, q.grad, k.grad, v.grad]


def errors(rank: int, inside: Inside) -> list[Any]:
    """What is wrong on rank 1, as all ranks are told."""
    wrong, CUT = rank == 1, sharding_of(2, (2, 1, 0, 2))
    expert_BlK = torch.zeros(*CUT.local_shape(rank), 2, dtype=torch.int64)
    weight_BlK = torch.full(expert_BlK.shape, torch.nan if wrong else 1.0)
    x_BlNH = drawn(2, CUT.local_shape(rank)[1] + wrong, 4, 4)
    loss_Bl, target_Bl = torch.ones(2, 3), torch.zeros(2, 3 + wrong, dtype=torch.int64)
    batch = Batch(token_BL=tokens(2, 5 - wrong)) if wrong else GOOD
    terms: dict[str, Any] = {"dim": 4, "sharding": CUT, "experts": Partition((1, 1, 1, 1)), "group": world()}
    small = StaticSizes(rows_per_pair=1, rows=1)
    with inside:
        return [
            refusal(lambda: plan_dispatch(expert_BlK, weight_BlK=weight_BlK, **terms)),
            refusal(plan_static(expert_BlK, sizes=small, **terms).check),
            refusal(lambda: agree(f"{rank}", device=CPU, group=world())),
            refusal(lambda: ulysses_attention(x_BlNH, x_BlNH, x_BlNH, sharding=CUT, group=world())),
            refusal(lambda: shard_batch(batch, sharding=CUT, group=world())),
            refusal(lambda: mean_loss(loss_Bl, target_Bl, group=world())),
            refusal(lambda: gather_sharding(-rank, device=CPU, group=world())),
        ]


ATTENTION: list[Mapping[str, Any]] = [
    {},
    {"is_causal": True, "window": (2, 0)},
    {"sinks_N": torch.arange(6.0, dtype=torch.float64), "dropout_p": 0.25},
    {"key_padding_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()},
    {"attn_mask": torch.linspace(-1, 1, 25, dtype=torch.float64).view(1, 1, 5, 5)},
    {"is_causal": True, **PACKED},
    {"is_causal": True, "attend": flex_attend(score_mod=lambda s, b, h, q, k: s + h)},
]
BATCHES: list[Mapping[str, Any]] = [
    {},
    {"attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])},
    {"attention_mask": torch.ones(2, 1, 5, 5).tril().bool()},
    PACKED,
]
OPERATIONS: list[tuple[Callable[..., list[Any]], tuple[Any, ...]]] = [
    *((layer, (kind,)) for kind in KINDS),
    *((rows, (kind,)) for kind in KINDS),
    (training, ()),
    (routing, ()),
    (regions, ()),
    *((attention, (options,)) for options in ATTENTION),
    (exchanges, ()),
    *((batches, (options,)) for options in BATCHES),
    (references, ()),
    (errors, ()),
]


def found(rank: int, at: int, default: str) -> list[Any]:
    operation, given = OPERATIONS[at]
    results = operation(rank, torch.device(default) if default else nullcontext(), *given)
    return [x.detach() if isinstance(x, Tensor) else x for x in results]


@pytest.mark.parametrize("at", range(len(OPERATIONS)), ids=lambda at: OPERATIONS[at][0].__name__)
def test_the_default_device_changes_nothing(at: int, rank_threads: RankThreads) -> None:
    usual, inside = (rank_threads.run(found, 4, at, default) for default in ("", "meta"))
    for wanted, got in zip(usual, inside, strict=True):
        assert len(got) == len(wanted) > 0
        for x, y in zip(got, wanted, strict=True):
            assert x is not None
            if isinstance(y, Tensor):
                assert x.device == y.device == CPU
                assert x.dtype == y.dtype
                assert torch.equal(x, y)
            else:
                assert x == y


def test_meta_as_default_shows_what_is_made_without_a_device() -> None:
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
