"""What a layer costs on a cluster, for each way of dispatching."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import Partition
from .chances import uniform_chances, zipf_chances
from .config import PlanConfig
from .demand import Chances, expected_demand
from .traffic import Traffic, Widths, row_per_choice, row_per_node, row_per_rank

PLACEMENTS = 4  # ways to deal the popular experts to ranks, averaged over
SCHEMES = (row_per_choice, row_per_rank, row_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One layer, one way of dispatching, one number of ranks. Bytes and rows leave a rank; what stays is not counted.

    Attributes:
        routing: "uniform", or Zipf's law with its exponent.
        rows_sent: mean rows that a rank sends to others in dispatch.
        intra_bytes, inter_bytes: per token, dispatch and combine, to ranks of the same node and of others. The
            backward sends as many again, without the ids that ride with rows by counts.
        plan_intra_bytes, plan_inter_bytes: mean per rank, of the plan.
        milliseconds: of plan, forward and backward: in each collective the busiest rank's slower link, in the
            direction with more, and a latency.
        mean_rows, fullest_rows: rows per rank of the experts, and on the rank with most (its mean over tokens).
        payload_bytes: buffers that a dispatch sends from and receives into, on the rank with most.
        row_bytes: rows of the experts, once, on the rank with most.
    """

    ranks: int
    nodes: int
    routing: str
    scheme: str
    rows_sent: float
    intra_bytes: float
    inter_bytes: float
    plan_intra_bytes: float
    plan_inter_bytes: float
    milliseconds: float
    mean_rows: float
    fullest_rows: float
    payload_bytes: float
    row_bytes: float


def widths_of(config: PlanConfig) -> Widths:
    itemsize = {name: getattr(torch, name).itemsize for name in (config.model.dtype, config.model.weight_dtype)}
    return Widths(
        dim=config.model.dim,
        num_choices=config.model.top_k,
        row_bytes=itemsize[config.model.dtype],
        weight_bytes=itemsize[config.model.weight_dtype],
    )


def predict(config: PlanConfig) -> Iterator[Prediction]:
    """Uniform routing, then Zipf's law; for each the three ways to dispatch."""
    experts = Partition.balanced(config.model.experts, config.cluster.ranks)
    zipf = f"zipf {config.load.zipf:g}"
    deals = [_zipf(config, experts, seed) for seed in range(PLACEMENTS)]
    for routing, all_chances in (("uniform", [_uniform(config, experts)]), (zipf, deals)):
        for scheme in SCHEMES:
            found = [
                _numbers(
                    config, scheme(expected_demand(chances, experts, config.load.tokens_per_rank), widths_of(config))
                )
                for chances in all_chances
            ]
            means = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
            name = scheme.__name__.replace("_", " ")
            yield Prediction(
                ranks=config.cluster.ranks, nodes=config.cluster.nodes, routing=routing, scheme=name, **means
            )


def link_sums(leg_PP: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
    """(P,) each: what every rank sends inside its node, sends to other nodes, receives inside, receives from others.

    What stays on the rank is in none of them.
    """
    leg_NRNR = leg_PP.unflatten(1, (num_nodes, -1)).unflatten(0, (num_nodes, -1))
    own_RRN = leg_NRNR.diagonal(dim1=0, dim2=2)  # source place, destination place, node
    kept_P, own_sent_P, own_received_P = leg_PP.diagonal(), own_RRN.sum(1).T.flatten(), own_RRN.sum(0).T.flatten()
    return (
        own_sent_P - kept_P,
        leg_PP.sum(1) - own_sent_P,
        own_received_P - kept_P,
        leg_PP.sum(0) - own_received_P,
    )


def _uniform(config: PlanConfig, experts: Partition) -> Chances:
    model = config.model
    return uniform_chances(
        experts,
        config.cluster.nodes,
        num_choices=model.top_k,
        groups=model.groups,
        limited_groups=model.limited_groups,
    )


def _zipf(config: PlanConfig, experts: Partition, seed: int) -> Chances:
    model = config.model
    return zipf_chances(
        experts,
        config.cluster.nodes,
        num_choices=model.top_k,
        exponent=config.load.zipf,
        seed=seed,
        groups=model.groups,
        limited_groups=model.limited_groups,
    )


def _numbers(config: PlanConfig, traffic: Traffic) -> dict[str, float]:
    nodes, tokens = config.cluster.nodes, config.load.tokens_per_rank
    plan = [link_sums(leg_PP, nodes) for leg_PP in traffic.plan]
    rows = [link_sums(rows_PP, nodes) for rows_PP in traffic.ways]
    forth = [tuple(traffic.there * sum_P for sum_P in leg) for leg in rows]
    back = [tuple(traffic.home * leg[link] for link in (2, 3, 0, 1)) for leg in reversed(rows)]
    forward = [*plan, *forth, *back]
    gradients = [tuple(traffic.gradient * sum_P for sum_P in leg) for leg in rows]
    backward = [*_turned(back), *_turned(gradients)]
    fullest_rows = traffic.rows_P.max().item()
    payload_P = sum((rows_PP.sum(0) + rows_PP.sum(1) for rows_PP in traffic.ways), sum(traffic.kept, torch.zeros(())))

    def mean(legs: Sequence[Sequence[Tensor]], link: int) -> float:
        return sum(leg[link].double().mean().item() for leg in legs)

    return {
        "rows_sent": mean(rows, 0) + mean(rows, 1),
        "intra_bytes": mean([*forth, *back], 0) / tokens,
        "inter_bytes": mean([*forth, *back], 1) / tokens,
        "plan_intra_bytes": mean(plan, 0),
        "plan_inter_bytes": mean(plan, 1),
        "milliseconds": sum(_milliseconds(leg, config) for leg in (*forward, *backward)),
        "mean_rows": traffic.rows_P.double().mean().item(),
        "fullest_rows": fullest_rows,
        "payload_bytes": payload_P.max().item() * traffic.there,
        "row_bytes": fullest_rows * traffic.home,
    }


def _turned(legs: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """The same bytes the other way, last leg first: what backward sends for each leg of forward."""
    return [tuple(leg[link] for link in (2, 3, 0, 1)) for leg in reversed(legs)]


def _milliseconds(leg: Sequence[Tensor], config: PlanConfig) -> float:
    cluster = config.cluster
    speeds = (cluster.intra_gb_s, cluster.inter_gb_s) * 2
    seconds = max(sum_P.max().item() / (1e9 * speed) for sum_P, speed in zip(leg, speeds, strict=True))
    return 1e3 * seconds + 1e-3 * cluster.latency_us
