"""How many choices and tokens ranks have for each other: counted, or expected."""

from itertools import combinations

import pytest
import torch

from moe_dispatch import (
    Partition,
)
from moe_dispatch.lab.forecast.chances import uniform_chances, zipf_chances
from moe_dispatch.lab.forecast.demand import counted_demand, expected_demand
from moe_dispatch.lab.forecast.traffic import Widths, row_per_choice, row_per_node, row_per_rank


def test_ids_of_the_wrong_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="ids of 1 ranks, experts on 2 and 1 nodes; give ids"):
        counted_demand([torch.zeros(1, 1, dtype=torch.int64)], Partition((1, 1)), 1)
    with pytest.raises(ValueError, match="as many ranks on every node"):
        counted_demand([torch.zeros(1, 1, dtype=torch.int64)] * 3, Partition((1, 1, 1)), 2)


@pytest.mark.parametrize(
    ("sizes", "num_choices", "groups", "limited_groups"),
    [((2, 1, 0, 3), 2, 1, 1), ((3, 3), 3, 3, 2), ((1, 2, 1, 2), 2, 3, 1), ((0, 4, 1, 1), 4, 2, 2)],
)
def test_uniform_chances_are_those_of_every_choice_listed(
    sizes: tuple[int, ...], num_choices: int, groups: int, limited_groups: int
) -> None:
    experts, size = Partition(sizes), sum(sizes) // groups
    listed = [
        torch.tensor([chosen])
        for in_reach in combinations(range(groups), limited_groups)
        for chosen in combinations([g * size + i for g in in_reach for i in range(size)], num_choices)
    ]
    demands = [counted_demand([one] + [one[:0]] * (len(sizes) - 1), experts, 2) for one in listed]
    found = uniform_chances(experts, 2, num_choices=num_choices, groups=groups, limited_groups=limited_groups)
    for name, field in (("choices_PP", "choices_P"), ("tokens_PP", "ranks_P"), ("tokens_PN", "nodes_N")):
        wanted = torch.stack([getattr(demand, name)[0] for demand in demands]).double().mean(0)
        torch.testing.assert_close(getattr(found, field), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("groups", "limited_groups"), [(1, 1), (4, 2)])
def test_zipf_of_exponent_0_is_uniform(groups: int, limited_groups: int) -> None:
    experts, given = Partition.balanced(32, 8), {"num_choices": 4, "groups": groups, "limited_groups": limited_groups}
    zipf, uniform = zipf_chances(experts, 2, exponent=0.0, seed=0, **given), uniform_chances(experts, 2, **given)
    torch.testing.assert_close(zipf.choices_P, uniform.choices_P, rtol=0.1, atol=0)  # 8192 samples
    if groups == 1:  # which experts of the groups in reach are taken is another law otherwise
        torch.testing.assert_close(zipf.ranks_P, uniform.ranks_P, rtol=0.1, atol=0)
        torch.testing.assert_close(zipf.nodes_N, uniform.nodes_N, rtol=0.1, atol=0)


def test_zipf_of_one_choice_has_the_weights_of_the_law() -> None:
    found = zipf_chances(Partition((1,) * 4), 2, num_choices=1, exponent=1.0, seed=3)
    wanted = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4], dtype=torch.float64)
    sorted_P = found.choices_P.sort(descending=True).values
    torch.testing.assert_close(sorted_P, wanted / wanted.sum(), rtol=0, atol=0.02)
    assert torch.equal(found.choices_P, found.ranks_P)
    again = zipf_chances(Partition((1,) * 4), 2, num_choices=1, exponent=1.0, seed=3)
    assert torch.equal(again.choices_P, found.choices_P)


def test_expected_bytes_are_the_mean_of_counted_ones() -> None:
    """400 draws of 4 tokens per rank: means are within 4 standard errors of what is expected."""
    experts, generator = Partition((3, 1, 2, 2)), torch.Generator().manual_seed(0)
    widths = Widths(dim=5, num_choices=3, row_bytes=2, weight_bytes=4)
    expected = expected_demand(uniform_chances(experts, 2, num_choices=3), experts, 4)
    draws = [
        counted_demand([torch.rand(4, 8, generator=generator).topk(3).indices for _ in range(4)], experts, 2)
        for _ in range(400)
    ]
    for scheme in (row_per_choice, row_per_rank, row_per_node):
        wanted, counted = scheme(expected, widths), [scheme(draw, widths) for draw in draws]
        for i, leg_PP in enumerate((*wanted.dispatch, *wanted.combine, *wanted.backward)):
            drawn = torch.stack([(*each.dispatch, *each.combine, *each.backward)[i] for each in counted]).double()
            error_PP = drawn.std(0) / len(draws) ** 0.5
            assert ((drawn.mean(0) - leg_PP).abs() <= 4 * error_PP + 1e-9).all()
        assert all(a.equal(b) for a, b in zip(wanted.plan, counted[0].plan, strict=True))
