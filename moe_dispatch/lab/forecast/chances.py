"""How likely a token is to need a rank or a node: exactly for uniform routing, from samples for Zipf's law."""

from collections import Counter
from collections.abc import Sequence
from math import comb

import torch

from ... import Partition
from .demand import Chances

SAMPLES = 8192  # tokens: a chance of 1 % is then known to a tenth of it


def uniform_chances(
    experts: Partition, num_nodes: int, *, num_choices: int, groups: int = 1, limited_groups: int = 1
) -> Chances:
    """Every set of K distinct experts in every set of ``limited_groups`` groups is as likely: hypergeometric, exact.

    Args:
        experts: of each rank; ``groups`` divides their number.
        num_nodes: divides the number of ranks.
        num_choices: K, at most the experts of ``limited_groups`` groups.
        groups, limited_groups: a token chooses among the experts of so many groups (node-limited routing,
            arXiv:2412.19437); 1 and 1 for all.
    """
    in_node = len(experts) // num_nodes
    sizes_N = [sum(experts.sizes[first : first + in_node]) for first in range(0, len(experts), in_node)]
    ranks, nodes = (
        needed_chances(sizes, num_choices=num_choices, groups=groups, limited_groups=limited_groups)
        for sizes in (experts.sizes, sizes_N)
    )
    return Chances(
        choices_P=torch.tensor(experts.sizes, dtype=torch.float64) * num_choices / experts.total,
        ranks_P=torch.tensor(ranks, dtype=torch.float64),
        nodes_N=torch.tensor(nodes, dtype=torch.float64),
    )


def needed_chances(sizes: Sequence[int], *, num_choices: int, groups: int, limited_groups: int) -> list[float]:
    """For consecutive pieces of the experts, the chance that a token needs the piece; see :func:`uniform_chances`."""
    group_size = sum(sizes) // groups
    reach = limited_groups * group_size
    sets = comb(groups, limited_groups) * comb(reach, num_choices)
    known: dict[tuple[int, int], float] = {}
    found, first = [], 0
    for size in sizes:
        place = (first % group_size, size)  # as good as another piece of this size, at this place in its group
        if place not in known:
            # How many experts of the piece are in each group that it touches.
            per_group = tuple(Counter(expert // group_size for expert in range(first, first + size)).values())
            ways = _held_ways(per_group, groups, limited_groups)
            known[place] = 1 - sum(n * comb(reach - held, num_choices) for held, n in ways.items()) / sets
        found.append(known[place])
        first += size
    return found


def zipf_chances(
    experts: Partition,
    num_nodes: int,
    *,
    num_choices: int,
    exponent: float,
    seed: int,
    groups: int = 1,
    limited_groups: int = 1,
) -> Chances:
    """The n-th most popular expert has weight 1 / n ** exponent; K are drawn without replacement.

    Popularity is dealt to the experts at random. Drawn as the K largest of log weight plus Gumbel noise, which is the
    same (Efraimidis and Spirakis 2006); under node-limited routing among the groups with the largest sum of their
    best two.

    Args:
        seed: of popularity and samples.
        experts, num_nodes, num_choices, groups, limited_groups: as in :func:`uniform_chances`.
    """
    generator = torch.Generator().manual_seed(seed)
    place_E = torch.randperm(experts.total, generator=generator)
    weight_E = (1.0 + place_E.double()) ** -exponent
    noise_TE = -torch.empty(SAMPLES, experts.total).exponential_(generator=generator).log()
    score_TE = weight_E.log().float() + noise_TE
    if limited_groups < groups:
        score_TGe = score_TE.unflatten(1, (groups, -1))
        group_TG = score_TGe.topk(min(2, score_TGe.shape[2]), dim=2).values.sum(2)
        in_reach_TG = torch.zeros_like(group_TG).scatter_(1, group_TG.topk(limited_groups, dim=1).indices, 1.0)
        score_TE = score_TGe.where(in_reach_TG.unsqueeze(2) > 0, -torch.inf).flatten(1)
    rank_TK = experts.owner(score_TE.topk(num_choices, dim=1).indices)
    choices_TP = torch.zeros(SAMPLES, len(experts)).scatter_add_(1, rank_TK, torch.ones(rank_TK.shape))
    needed_TP = choices_TP > 0
    return Chances(
        choices_P=choices_TP.mean(0, dtype=torch.float64),
        ranks_P=needed_TP.double().mean(0),
        nodes_N=needed_TP.unflatten(1, (num_nodes, -1)).any(2).double().mean(0),
    )


def _held_ways(per_group: tuple[int, ...], groups: int, limited_groups: int) -> Counter[int]:
    """Among the choices of ``limited_groups`` of the groups, how many hold so many of a piece's experts."""
    ways = Counter({(0, 0): 1})  # (groups taken, experts of the piece in them)
    for held in (*per_group, *[0] * (groups - len(per_group))):
        ways += Counter({(taken + 1, total + held): count for (taken, total), count in ways.items()})
    found: Counter[int] = Counter()
    for (taken, total), count in ways.items():
        if taken == limited_groups:
            found[total] += count
    return found
