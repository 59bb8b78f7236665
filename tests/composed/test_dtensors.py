"""A DTensor where a rank's own tensor belongs: one sentence, on every rank, with what to do."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_dispatch import (
    Counted,
    GroupedExperts,
    MoE,
    Partition,
    StaticSizes,
    TokenSharding,
    TopKRouter,
    combine,
    dispatch,
    exchange_rows,
    gather_tokens,
    place_tokens,
    plan_dispatch,
    plan_static,
)
from moe_dispatch.plan.planner import Planner
from moe_dispatch.testing import RankPool
from sp_attention import (
    Batch,
    Scheme,
    attention_over_ranks,
    count_targets,
    gather_outputs,
    mean_cross_entropy,
    mean_loss,
    shard_batch,
    shift_labels,
    ulysses_attention,
)
from tests.support.attention.batches import GOOD, tokens
from tests.support.ranks import refusal, world

RANKS = 2
SHARDING = TokenSharding(batch=2, seq=Partition((3, 2)))
EXPERTS = Partition((1, 3))


class Inputs:
    """Of one rank; ``wrong`` makes DTensors on rank 1 only, ``everywhere`` on both."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.mesh = init_device_mesh("cpu", (RANKS,))
        self.x_BlD = torch.ones(*SHARDING.local_shape(rank), 8)
        self.expert_BlK = torch.arange(self.x_BlD.shape[:2].numel() * 2).view(*self.x_BlD.shape[:2], 2) % 4
        self.weight_BlK = torch.ones(self.expert_BlK.shape)

    def everywhere(self, x: Tensor) -> DTensor:
        return DTensor.from_local(x, self.mesh, [Shard(min(x.ndim, 2) - 1)], run_check=False)

    def wrong(self, x: Tensor, whole: bool = False) -> Tensor:
        if self.rank == 0:
            return x
        return DTensor.from_local(x, self.mesh, [Replicate()], run_check=False) if whole else self.everywhere(x)


def moe_with(planner: Planner) -> MoE:
    experts = GroupedExperts(EXPERTS.sizes[world().rank()], 8, 4)
    return MoE(
        router=TopKRouter(8, 4, 2, score="softmax"),
        experts=experts,
        partition=EXPERTS,
        group=world(),
        planner=planner,
    )


def refusals(rank: int) -> dict[str, str]:
    of, group = Inputs(rank), world()
    x_BlD, expert_BlK, weight_BlK = of.x_BlD, of.expert_BlK, of.weight_BlK
    terms: dict[str, Any] = {"dim": 8, "sharding": SHARDING, "experts": EXPERTS, "group": group}
    sizes = StaticSizes(rows_per_pair=10, rows=20)
    plan = plan_dispatch(expert_BlK, **terms)
    x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
    q_BlNH, target_Bl = torch.ones(*SHARDING.local_shape(rank), 2, 4), torch.zeros(2, 3, dtype=torch.int64)
    part = shard_batch(GOOD, sharding=SHARDING, group=group)

    def attend(q: Tensor, k: Tensor, **options: Any) -> Tensor:
        return ulysses_attention(q, k, q_BlNH, sharding=SHARDING, group=group, **options)

    def over_ranks(q: Tensor, **options: Any) -> Tensor:
        return attention_over_ranks(
            q, q_BlNH, q_BlNH, sharding=SHARDING, group=group, scheme=Scheme.gather(), **options
        )

    def cut(**fields: Any) -> object:
        return shard_batch(Batch(**fields), sharding=SHARDING, group=group)

    wrong, everywhere = of.wrong, of.everywhere
    return {
        "plan": refusal(lambda: plan_dispatch(wrong(expert_BlK), **terms)),
        "plan, weights": refusal(lambda: plan_dispatch(expert_BlK, weight_BlK=wrong(weight_BlK), **terms)),
        "static plan": refusal(lambda: plan_static(wrong(expert_BlK), sizes=sizes, **terms)),
        "dispatch": refusal(lambda: dispatch(everywhere(x_BlD), weight_BlK, plan)),
        "dispatch, weights": refusal(lambda: dispatch(x_BlD, everywhere(weight_BlK), plan)),
        "combine": refusal(lambda: combine(everywhere(x_MD), plan)),
        "combine, weights": refusal(lambda: combine(x_MD, plan, everywhere(weight_M))),
        "moe": refusal(lambda: moe_with(Counted())(wrong(x_BlD), sharding=SHARDING)),
        "moe, static": refusal(lambda: moe_with(sizes)(wrong(x_BlD), sharding=SHARDING)),
        "moe, padding": refusal(
            lambda: moe_with(Counted())(x_BlD, sharding=SHARDING, real_Bl=wrong(weight_BlK[..., 0] > 0))
        ),
        "moe, ids": refusal(lambda: moe_with(Counted())(x_BlD, sharding=SHARDING, expert_BlK=wrong(expert_BlK))),
        "queries": refusal(lambda: attend(wrong(q_BlNH), q_BlNH)),
        "keys": refusal(lambda: attend(q_BlNH, wrong(q_BlNH))),
        "sinks": refusal(lambda: attend(q_BlNH, q_BlNH, sinks_N=wrong(torch.ones(2), whole=True))),
        "queries, gather": refusal(lambda: over_ranks(wrong(q_BlNH))),
        "sinks, gather": refusal(lambda: over_ranks(q_BlNH, sinks_N=wrong(torch.ones(2), whole=True))),
        "documents": refusal(
            lambda: ulysses_attention(
                *(q_BlNH[:1],) * 3,
                sharding=TokenSharding(batch=1, seq=SHARDING.seq),
                group=group,
                cu_seqlens=wrong(torch.tensor([0, 5]), whole=True),
            )
        ),
        "tokens": refusal(lambda: cut(token_BL=wrong(tokens(2, 5), whole=True))),
        "fields": refusal(lambda: cut(token_BL=tokens(2, 5), fields={"x": wrong(torch.ones(2, 5), whole=True)})),
        "outputs": refusal(lambda: gather_outputs(wrong(x_BlD), batch=part, group=group)),
        "losses": refusal(lambda: mean_loss(wrong(torch.ones(2, 3)), target_Bl, group=group)),
        "targets": refusal(lambda: mean_loss(torch.ones(2, 3), wrong(target_Bl), group=group)),
        "logits": refusal(lambda: mean_cross_entropy(wrong(torch.ones(2, 3, 9)), target_Bl, group=group)),
        "count": refusal(lambda: count_targets(wrong(target_Bl), group=group)),
    }


def test_a_dtensor_is_refused_on_every_rank(rank_pool: RankPool) -> None:
    texts_of_rank = rank_pool.run(refusals, RANKS)
    by_itself = {"dispatch", "dispatch, weights", "combine", "combine, weights"}  # as all that only one rank can see
    names = {
        "dispatch": "x_BlD",
        "dispatch, weights": "weight_BlK",
        "combine": "y_MD",
        "combine, weights": "weight_M",
    }
    names |= {
        "plan": "expert_BlK",
        "plan, weights": "weight_BlK",
        "static plan": "expert_BlK",
        "documents": "cu_seqlens",
    }
    names |= {"moe, padding": "real_Bl", "moe, ids": "expert_BlK"}
    names |= {"moe": "x_BlD", "moe, static": "x_BlD", "queries": "q", "keys": "k", "sinks": "sinks_N"}
    names |= {"queries, gather": "q", "sinks, gather": "sinks_N"}
    names |= {"outputs": "x_BlD", "losses": "loss_Bl", "targets": "target_Bl", "logits": "logits_BlV"}
    names |= {"count": "target_Bl", "tokens": "token_BL", "fields": "fields['x']"}
    for rank, texts in enumerate(texts_of_rank):
        assert texts.keys() == names.keys()
        for what, text in texts.items():
            at, name = rank if what in by_itself else 1, names[what]
            if what in ("tokens", "fields"):
                wanted = (
                    f"rank 1: {name} is a DTensor; shard_batch cuts ordinary tensors of the whole batch: pass its "
                    ".to_local() if each rank has the whole, else its .full_tensor()"
                )
            else:
                wanted = f"rank {at}: {name} is a DTensor; pass this rank's ordinary tensor, {name}.to_local()"
            assert text == wanted, what


def of_one_rank(rank: int) -> dict[str, str]:
    """What only this rank can see, and says without its number."""
    of, group = Inputs(rank), world()
    x_BlD, label_BL = of.everywhere(of.x_BlD), of.everywhere(tokens(2, 5))
    return {
        "x_BlD gathered": refusal(lambda: gather_tokens(x_BlD, sharding=SHARDING, group=group)),
        "x_BlD placed": refusal(lambda: place_tokens(x_BlD, sharding=SHARDING, rank=rank)),
        "rows": refusal(lambda: exchange_rows(x_BlD, (1, 1), (1, 1), group)),
        "label_BL": refusal(lambda: shift_labels(label_BL)),
    }


def test_a_dtensor_is_refused_before_it_is_gathered_or_shifted(rank_pool: RankPool) -> None:
    for texts in rank_pool.run(of_one_rank, RANKS):
        for what, text in texts.items():
            name = what.split()[0]
            assert text == f"{name} is a DTensor; pass this rank's ordinary tensor, {name}.to_local()"
