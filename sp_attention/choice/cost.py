"""What a call costs in one scheme, on a machine: bytes, collectives, work, memory and time, from its plan."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from moe_dispatch.internals import check_count

from ..work.memory import memory_of
from ..work.plan import Work
from ..work.scheme import Scheme
from ..work.traffic import Sent, Sizes, traffic_of

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a scheme is measured by.

    Attributes:
        ranks_per_node: neighbouring ranks are on one node.
        intra_gb_s: gigabytes (1e9) per second of one rank in each direction, to ranks of its node.
        inter_gb_s: the same to other nodes.
        latency_us: microseconds that a collective takes at least.
        tflop_s: 1e12 operations per second of attention on one rank; ``math.inf`` compares what travels only.

    Raises:
        ValueError: a number that cannot be.
    """

    ranks_per_node: int
    intra_gb_s: float
    inter_gb_s: float
    latency_us: float
    tflop_s: float

    def __post_init__(self) -> None:
        check_count(self.ranks_per_node, "ranks_per_node", least=1)
        for name in ("intra_gb_s", "inter_gb_s", "tflop_s", "latency_us"):
            value, may_be_0 = getattr(self, name), name == "latency_us"
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not (value > 0 or (may_be_0 and value == 0)):
                raise ValueError(f"{name} is {value!r}; it has to be a number above 0{', or 0' * may_be_0}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeCost:
    """One call, forward and backward, in one scheme.

    Attributes:
        scheme: what it is of.
        forward_bytes: from a rank to another, of all ranks together, in forward.
        backward_bytes: the same of backward.
        intra_bytes: forward and backward, over the fullest link of a rank to others of its node, in the direction
            with more.
        inter_bytes: the same to other nodes.
        collectives: forward and backward.
        balance: pairs of a query and a key, times heads, of the fullest rank over the mean.
        kept_bytes: from forward to backward, of the rank with most: see docs/planning.md.
        most_bytes: on the device, what is kept and what arrives at once, of the rank with most.
        link_ms: of each collective the slowest link, and its latency.
        work_ms: of the fullest rank.
    """

    scheme: Scheme
    forward_bytes: int
    backward_bytes: int
    intra_bytes: int
    inter_bytes: int
    collectives: int
    balance: float
    kept_bytes: int
    most_bytes: int
    link_ms: float
    work_ms: float

    @property
    def milliseconds(self) -> float:
        """Of links and then of work. What is hidden behind the other is not taken off."""
        return self.link_ms + self.work_ms


def cost_of(work: Work, sizes: Sizes, machine: Machine) -> SchemeCost:
    """Of all ranks of a call."""
    traffic = traffic_of(work, sizes)
    links = [Links.of(sent, machine.ranks_per_node) for sent in (*traffic.forward, *traffic.backward)]
    whole = Links.sum_of(links)
    # Ranks of a team differ by their heads only.
    alike = {
        (work.team(rank), work.query_heads(rank)[1], work.key_heads_of(rank)[1]): rank for rank in range(work.ranks)
    }
    memory = [memory_of(work, sizes, rank) for rank in alike.values()]
    pairs = _pairs_of_ranks(work)
    flops = operations(sizes) * max(pairs) * sizes.batch
    return SchemeCost(
        scheme=work.scheme,
        forward_bytes=sum(sum(sent.values()) for sent in traffic.forward),
        backward_bytes=sum(sum(sent.values()) for sent in traffic.backward),
        intra_bytes=max(whole.intra.values(), default=0),
        inter_bytes=max(whole.inter.values(), default=0),
        collectives=len(links),
        balance=max(pairs) * len(pairs) / sum(pairs) if sum(pairs) else 1.0,
        kept_bytes=max(each.kept for each in memory),
        most_bytes=max(each.most for each in memory),
        link_ms=sum(_milliseconds(link, machine) for link in links),
        work_ms=1e3 * flops / (TERA * machine.tflop_s),
    )


def operations(sizes: Sizes) -> int:
    """Of a pair of a query and a key, and a head, forward and backward: products of H and of Hv numbers, 2 operations
    a number. Forward has one of each; backward 3 and 2 (the weights again, then dq, dk; the gradient of the weights,
    dv)."""
    return 2 * (4 * sizes.query + 3 * sizes.output)


def _pairs_of_ranks(work: Work) -> list[int]:
    """Pairs times heads of each rank."""
    of_team = [work.seen.pairs(queries) for queries in work.queries]
    return [of_team[work.team(rank)] * work.query_heads(rank)[1] for rank in range(work.ranks)]


Way = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Links:
    """Bytes over the link of each rank, in each direction.

    Attributes:
        intra: to and from ranks of its node.
        inter: to and from other nodes.
    """

    intra: Counter[Way]
    inter: Counter[Way]

    @classmethod
    def of(cls, sent: Sent, ranks_per_node: int) -> "Links":
        links = cls(Counter(), Counter())
        for (source, to), number in sent.items():
            link = links.intra if source // ranks_per_node == to // ranks_per_node else links.inter
            link[source, "out"] += number
            link[to, "in"] += number
        return links

    @classmethod
    def sum_of(cls, links: Iterable["Links"]) -> "Links":
        whole = cls(Counter(), Counter())
        for each in links:
            whole.intra.update(each.intra)
            whole.inter.update(each.inter)
        return whole


def _milliseconds(links: Links, machine: Machine) -> float:
    speeds = ((links.intra, machine.intra_gb_s), (links.inter, machine.inter_gb_s))
    seconds = max(max(link.values(), default=0) / (GIGA * speed) for link, speed in speeds)
    return 1e3 * seconds + 1e-3 * machine.latency_us
