"""What is composed with other people's code: a module around each thing that this library does in a model.

Each takes a rank's tokens to as many tokens of the same width, so that all can be wrapped, cut into stages, compiled
and checkpointed the same way. What is a number there (a loss) is added to every token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dispatch import (
    GroupedExperts,
    MoE,
    Partition,
    SwiGLU,
    TokenSharding,
    TopKRouter,
    combine,
    dispatch,
    plan_dispatch,
    sequence_balance_loss,
)
from sp_attention import (
    AttentionOverRanks,
    Batch,
    Scheme,
    mean_cross_entropy,
    mean_loss,
    scaled_dot_product,
    shard_batch,
    shift_labels,
    ulysses_attention,
)

DIM, HIDDEN, HEADS, EXPERTS, TOP_K, VOCABULARY = 8, 16, 2, 4, 2, 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What each of two ranks holds."""

    seq: tuple[int, int]
    experts: tuple[int, int]
    heads: tuple[int, int]

    @property
    def sharding(self) -> TokenSharding:
        return TokenSharding(batch=2, seq=Partition(self.seq))


EVEN = Layout(seq=(3, 2), experts=(1, 3), heads=(1, 1))
BARE = Layout(seq=(5, 0), experts=(4, 0), heads=(2, 0))  # the second rank has no tokens, no experts and no heads
LAYOUTS = {"uneven": EVEN, "one rank has nothing": BARE}


class Held:
    """The group of a module that calls functions; its copies communicate in it too."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> "Held":
        return self


class Experts(nn.Module):
    """A router and experts, the same whole ones for any layout."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.layout, self.held = layout, Held(group)
        self.router = TopKRouter(DIM, EXPERTS, TOP_K, score="softmax")
        self.experts = GroupedExperts(layout.experts[group.rank()], DIM, HIDDEN)


class Layer(nn.Module):
    """An MoE layer with shared experts and its balance loss."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        super().__init__()
        of = Experts(layout, group)
        self.sharding, self.held, self.before = layout.sharding, Held(group), nn.Linear(DIM, DIM)
        self.moe = MoE(
            router=of.router,
            experts=of.experts,
            partition=Partition(layout.experts),
            group=group,
            shared=SwiGLU(DIM, HIDDEN),
        )

    def forward(self, x_BlD: Tensor) -> Tensor:
        h_BlD = torch.tanh(self.before(x_BlD))
        y_BlD, scores_BlE = self.moe(h_BlD, sharding=self.sharding)
        loss = sequence_balance_loss(scores_BlE, top_k=TOP_K, sharding=self.sharding, group=self.held.group)
        return h_BlD + torch.tanh(y_BlD) + loss.to(y_BlD.dtype)


class Rows(nn.Module):
    """plan_dispatch, dispatch and combine by themselves, with weights in combine."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        super().__init__()
        of = Experts(layout, group)
        self.router, self.experts = of.router, of.experts
        self.layout, self.held, self.before = layout, Held(group), nn.Linear(DIM, DIM)

    def forward(self, x_BlD: Tensor) -> Tensor:
        h_BlD = torch.tanh(self.before(x_BlD))
        weight_BlK, expert_BlK = self.router(h_BlD).topk(TOP_K, -1)
        partition = Partition(self.layout.experts)
        plan = plan_dispatch(
            expert_BlK, dim=DIM, sharding=self.layout.sharding, experts=partition, group=self.held.group
        )
        x_MD, weight_M = dispatch(h_BlD, weight_BlK.to(h_BlD.dtype), plan)
        y_MD = self.experts(x_MD, plan.rows_per_expert_e, torch.ones_like(weight_M))
        return h_BlD + torch.tanh(combine(y_MD, plan, weight_M))


class Attention(nn.Module):
    """Ulysses attention between two linear layers."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.layout, self.held = layout, Held(group)
        self.before, self.after = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x_BlD: Tensor) -> Tensor:
        q_BlNH, k_BlNH, v_BlNH = self.before(x_BlD).unflatten(-1, (HEADS, -1)).chunk(3, -1)
        out_BlNH = ulysses_attention(
            q_BlNH,
            k_BlNH,
            v_BlNH,
            sharding=self.layout.sharding,
            heads=Partition(self.layout.heads),
            group=self.held.group,
            is_causal=True,
        )
        return x_BlD + self.after(torch.tanh(out_BlNH).flatten(2))


class Schemes(nn.Module):
    """Attention in one scheme after the other: kept or not, in chunks or whole, by an ``attend`` or in tiles."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.sharding, self.before = layout.sharding, nn.Linear(DIM, 3 * DIM)
        shared, heads = {"group": group, "is_causal": True}, Partition(layout.heads)
        self.attentions = nn.ModuleList(
            [
                AttentionOverRanks(scheme=Scheme.gather(), window=(3, 0), **shared),
                AttentionOverRanks(scheme=Scheme.gather(), attend=scaled_dot_product, **shared),
                AttentionOverRanks(scheme=Scheme.ring(keep=True, chunk=2), **shared),
                AttentionOverRanks(scheme=Scheme.two_dimensional(head_ranks=2, keys="ring"), **shared),
                AttentionOverRanks(scheme=Scheme.ulysses(offload=True, chunk=2), heads=heads, **shared),
            ]
        )

    def forward(self, x_BlD: Tensor) -> Tensor:
        for attention in self.attentions:
            qkv = self.before(x_BlD).unflatten(-1, (HEADS, -1)).chunk(3, -1)
            x_BlD = x_BlD + torch.tanh(attention(*qkv, sharding=self.sharding)).flatten(2)
        return x_BlD


def tokens_of(layout: Layout) -> Tensor:
    """(B, L), of the whole batch."""
    return torch.arange(2 * sum(layout.seq)).mul(7).remainder(VOCABULARY).view(2, -1)


class Losses(nn.Module):
    """mean_cross_entropy and mean_loss of the same tokens."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.layout, self.held, self.head = layout, Held(group), nn.Linear(DIM, VOCABULARY)

    def forward(self, x_BlD: Tensor) -> Tensor:
        target_Bl = self.layout.sharding.shard(shift_labels(tokens_of(self.layout)), self.held.group.rank())
        logits_BlV = self.head(torch.tanh(x_BlD))
        cross = mean_cross_entropy(logits_BlV, target_Bl, group=self.held.group)
        square = mean_loss(logits_BlV.square().mean(-1), target_Bl, group=self.held.group)
        return x_BlD + torch.tanh(x_BlD) * (cross.share + square.share).to(x_BlD.dtype)


class Shards(nn.Module):
    """shard_batch inside the model: token and position embeddings of this rank's part."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.layout, self.held = layout, Held(group)
        self.token, self.position = nn.Embedding(VOCABULARY, DIM), nn.Embedding(sum(layout.seq), DIM)

    def forward(self, x_BlD: Tensor) -> Tensor:
        mine = shard_batch(
            Batch(token_BL=tokens_of(self.layout)), sharding=self.layout.sharding, group=self.held.group
        )
        seen_Bl = mine.loss_mask_Bl.unsqueeze(-1).to(x_BlD.dtype)
        return x_BlD + torch.tanh(self.token(mine.token_Bl) + self.position(mine.position_Bl)) * (x_BlD + seen_Bl)


SUBJECTS: dict[str, Callable[[Layout, dist.ProcessGroup], nn.Module]] = {
    "MoE": Layer,
    "dispatch, combine": Rows,
    "ulysses_attention": Attention,
    "attention_over_ranks": Schemes,
    "losses": Losses,
    "shard_batch": Shards,
}


def made(what: str, layout: Layout, group: dist.ProcessGroup) -> nn.Module:
    """The module, with the weights that one seed gives: the same replicas on every rank, and whole experts cut."""
    torch.manual_seed(0)
    module = SUBJECTS[what](layout, group)
    for name, parameter in module.named_parameters():
        draw = torch.Generator().manual_seed(sum(map(ord, name)))
        shape, first = list(parameter.shape), 0
        if name.endswith(("_eDF", "_eFD")):
            shape[0], first = EXPERTS, sum(layout.experts[: group.rank()])
        whole = torch.randn(shape, generator=draw) / 3
        with torch.no_grad():
            parameter.copy_(whole[first : first + len(parameter)] if first or shape[0] == EXPERTS else whole)
    return module


def shards_of(layout: Layout, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A rank's tokens, and what pulls at its outputs."""
    draw = torch.Generator().manual_seed(1)
    wholes = [torch.randn(2, sum(layout.seq), DIM, generator=draw).to(dtype) for _ in range(2)]
    x_BlD, pull_BlD = (layout.sharding.shard(whole, rank).clone() for whole in wholes)
    return x_BlD, pull_BlD


def pulled(y_BlD: Tensor, pull_BlD: Tensor) -> Tensor:
    """() what to backpropagate."""
    return F.mse_loss(y_BlD, pull_BlD, reduction="sum")
