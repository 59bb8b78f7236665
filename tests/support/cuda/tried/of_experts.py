"""The operations of ``moe_dispatch``, in a case of any number of ranks: uneven tokens, experts that nobody chooses.
Of four ranks, one has no tokens and one no experts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import (
    GroupedExperts,
    MoE,
    NodeGroups,
    Partition,
    StaticSizes,
    SwiGLU,
    TokenSharding,
    TopKRouter,
    clip_grad_norm,
    combine,
    dispatch,
    plan_dispatch,
    plan_hierarchical,
    plan_static,
    sequence_balance_loss,
    start_combine,
    start_dispatch,
    sum_gradients,
)
from moe_dispatch.plan.counts.by_counts import ByCounts
from moe_dispatch.plan.terms import Terms
from tests.support.ranks import world

from .operation import Operation, Place, Step

DIM, CHOICES, HIDDEN = 16, 3, 24
TOKENS, EXPERTS = (5, 3, 4, 0), (4, 3, 0, 5)  # of four ranks, and again
NEVER_CHOSEN = 2  # the last experts


def of_ranks(sizes: Sequence[int]) -> Partition:
    """As many pieces as there are ranks."""
    return Partition(sizes[rank % len(sizes)] for rank in range(dist.get_world_size()))


def tokens_of_ranks() -> TokenSharding:
    """A new object: it keeps what is made for it."""
    return TokenSharding(batch=2, seq=of_ranks(TOKENS))


def experts_of_ranks() -> Partition:
    return of_ranks(EXPERTS)


def sizes_of_ranks() -> StaticSizes:
    """Enough for any choices."""
    longest, total = 2 * max(TOKENS), 2 * tokens_of_ranks().seq.total
    return StaticSizes(rows_per_pair=longest, rows=total * CHOICES)


def drawn(rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, weights and tokens of a rank, the last two leaves."""
    generator = torch.Generator().manual_seed(rank)
    shape = tokens_of_ranks().local_shape(rank)
    ids = torch.randint(-1, experts_of_ranks().total - NEVER_CHOSEN, (*shape, CHOICES), generator=generator)
    weight = torch.rand(*shape, CHOICES, generator=generator)
    x = torch.randn(*shape, DIM, generator=generator).to(dtype)
    return ids, weight.requires_grad_(), x.requires_grad_()


def nodes_of(rank: int) -> NodeGroups:
    """Two nodes, or one where ranks are odd."""
    ranks = dist.get_world_size()
    in_node = ranks // 2 if ranks % 2 == 0 else ranks
    nodes = [list(range(first, first + in_node)) for first in range(0, ranks, in_node)]
    kinds = [nodes, [list(column) for column in zip(*nodes, strict=True)]]
    made = [[(members, dist.new_group(members)) for members in kind] for kind in kinds]
    intra, inter = (next(group for members, group in kind if rank in members) for kind in made)
    assert isinstance(intra, dist.ProcessGroup)
    assert isinstance(inter, dist.ProcessGroup)
    return NodeGroups(inter=inter, intra=intra)


Planning = Callable[[Tensor, Tensor], Any]  # of ids and weights


def counted(rank: int) -> Planning:
    return partial(_plan, plan_dispatch, tokens_of_ranks(), group=world())


def by_counts(rank: int) -> Planning:
    """The other form of the same plan, which few ranks do not use."""
    terms = Terms(sharding=tokens_of_ranks(), experts=experts_of_ranks(), dim=DIM)
    return lambda ids_BlK, weight_BlK: ByCounts().plan(ids_BlK, weight_BlK.detach(), terms, world())


def static(rank: int) -> Planning:
    return partial(_plan, plan_static, tokens_of_ranks(), group=world(), sizes=sizes_of_ranks())


def hierarchical(rank: int) -> Planning:
    return partial(_plan, plan_hierarchical, tokens_of_ranks(), nodes=nodes_of(rank))


def _plan(
    plan: Callable[..., Any], sharding: TokenSharding, ids_BlK: Tensor, weight_BlK: Tensor, **given: Any
) -> Any:
    return plan(
        ids_BlK, weight_BlK=weight_BlK.detach(), dim=DIM, sharding=sharding, experts=experts_of_ranks(), **given
    )


def planning(kind: Callable[[int], Planning], rank: int, place: Place) -> Step:
    ids, weight, _ = map(place.tensor, drawn(rank))
    plan = kind(rank)

    def forward() -> Sequence[Tensor]:
        made = plan(ids, weight)
        last = getattr(made, "within", made)
        known = [made.rows_per_expert_e, last.token_of_sent_S, last.sent_of_entry_S, last.first_entry_t]
        return known if kind is by_counts else [*known, made.token_of_row_M, last.row_of_entry_M]

    return Step(forward)


def moving(kind: Callable[[int], Planning], weighted: bool, dtype: torch.dtype, rank: int, place: Place) -> Step:
    """Dispatch, and combine, with the weights in it or not; by a plan that is there."""
    ids, weight, x = map(place.tensor, drawn(rank, dtype))
    plan = kind(rank)(ids, weight)

    def forward() -> Sequence[Tensor]:
        x_MD, weight_M = dispatch(x, weight, plan)
        if weighted:
            return [combine(x_MD, plan, weight_M)]
        return [combine((x_MD * weight_M.unsqueeze(1)).to(dtype), plan)]

    return Step(forward, (x, weight))


def moving_behind(rank: int, place: Place) -> Step:
    """As :func:`moving`, with work while rows are on their way."""
    ids, weight, x = map(place.tensor, drawn(rank, torch.bfloat16))
    plan = counted(rank)(ids, weight)

    def forward() -> Sequence[Tensor]:
        rows = start_dispatch(x, weight, plan)
        meanwhile = x * 2
        x_MD, weight_M = rows.finish()
        rows = start_combine(x_MD, plan, weight_M)
        meanwhile = meanwhile * 2
        return [rows.finish() + meanwhile]

    return Step(forward, (x, weight))


def layer(planner: Callable[[int], Any], shared: bool, rank: int, place: Place) -> Step:
    """bfloat16, in which experts need not wait for their counts."""
    torch.manual_seed(5)
    router = TopKRouter(DIM, experts_of_ranks().total, CHOICES, score="sigmoid")
    shared_experts = SwiGLU(DIM, HIDDEN) if shared else None
    torch.manual_seed(rank)
    experts = GroupedExperts(experts_of_ranks().sizes[rank], DIM, HIDDEN)
    options = planner(rank)
    moe = MoE(
        router=router, experts=experts, partition=experts_of_ranks(), group=world(), shared=shared_experts, **options
    ).bfloat16()
    place.module(moe)
    _, _, x = map(place.tensor, drawn(rank, torch.bfloat16))
    sharding = tokens_of_ranks()

    def forward() -> Sequence[Tensor]:
        y, _ = moe(x, sharding=sharding)
        return [y]

    return Step(forward, (x, *moe.parameters()))


def training_step(rank: int, place: Place) -> Step:
    """Sums and clipping of gradients that are there."""
    torch.manual_seed(5)
    router = TopKRouter(DIM, experts_of_ranks().total, CHOICES, score="sigmoid")
    experts = GroupedExperts(experts_of_ranks().sizes[rank], DIM, HIDDEN)
    moe = place.module(MoE(router=router, experts=experts, partition=experts_of_ranks(), group=world()))
    grads = [place.tensor(torch.full(x.shape, rank + 1.0, device="cpu")) for x in moe.parameters()]

    def prepare() -> None:
        for x, grad in zip(moe.parameters(), grads, strict=True):
            x.grad = grad.clone()

    def forward() -> Sequence[Tensor]:
        sum_gradients(moe, group=world())
        return [clip_grad_norm(moe, 1.0)]

    return Step(forward, prepare=prepare)


def balance_loss(rank: int, place: Place) -> Step:
    _, _, x = drawn(rank)
    scores = place.tensor(x.detach().sigmoid().requires_grad_())
    sharding = tokens_of_ranks()
    return Step(lambda: [sequence_balance_loss(scores, top_k=CHOICES, sharding=sharding, group=world())], (scores,))


KINDS = {
    "plan_dispatch": (counted, 1),
    "plan_dispatch by counts": (by_counts, 1),
    "plan_static": (static, 0),
    "plan_hierarchical": (hierarchical, 2),
}
PLANNERS: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {
    "counted": (lambda rank: {}, 1),
    "fixed sizes": (lambda rank: {"planner": sizes_of_ranks()}, 0),
    "hierarchical": (lambda rank: {"planner": nodes_of(rank)}, 2),
}
OF_EXPERTS = (
    *(Operation(name=name, step=partial(planning, kind), d2h=(number, 0)) for name, (kind, number) in KINDS.items()),
    *(
        Operation(
            name=f"dispatch, combine by {name}" + " with weights" * weighted,
            step=partial(moving, kind, weighted, torch.bfloat16),
        )
        for name, (kind, _) in KINDS.items()
        for weighted in (False, True)
    ),
    Operation(name="start_dispatch, start_combine", step=moving_behind),
    *(
        Operation(name=f"MoE, {name}", step=partial(layer, planner, False), d2h=(number, 0))
        for name, (planner, number) in PLANNERS.items()
    ),
    Operation(
        name="MoE, counted, with shared experts", step=partial(layer, PLANNERS["counted"][0], True), d2h=(1, 0)
    ),
    Operation(name="sequence_balance_loss", step=balance_loss),
    Operation(name="sum_gradients, clip_grad_norm", step=training_step, d2h=(1, 0)),
)
