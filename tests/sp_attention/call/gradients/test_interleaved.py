"""Several modules at once, whose backwards run in any order."""

from itertools import permutations

import pytest
import torch
import torch.distributed as dist

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import UlyssesAttention
from sp_attention.reference import reference_attention
from tests.support.attention.case import named_case
from tests.support.attention.whole import Whole, shares_of, whole_answer
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE, difference, grad_of, leaf, share

# ---- cases: what the ranks run -------------------------------------------------------------------------


def interleaved(rank: int, backward_order: tuple[int, ...]) -> list[str]:
    """Three modules of different heads and groups; every forward before any backward."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    pair = pairs[rank % 2]
    assert isinstance(pair, dist.ProcessGroup)
    cases = [
        named_case(4, "causal", (2, 0, 3, 2), num_heads=(3, 3)),
        named_case(2, "causal", (4, 3), num_heads=(4, 2), widths=(4, 3)),
        named_case(4, "causal", (2, 1, 3, 1), num_heads=(12, 3)),
    ]
    kept, failures = [], []
    for case, group in zip(cases, (world(), pair, world()), strict=True):
        module, mine = UlyssesAttention(group=group, is_causal=True), group.rank()
        whole = Whole.of(case, torch.float64)
        leaves = [leaf(share(x, case.seq, "BL", mine)) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
        out_BlNH = module(*leaves, sharding=TokenSharding(batch=2, seq=Partition(case.seq)))
        kept.append((out_BlNH, leaves, share(whole.grad_BLNH, case.seq, "BL", mine)))
    for i in backward_order:
        kept[i][0].backward(kept[i][2])
    for i, (case, group) in enumerate(zip(cases, (world(), pair, world()), strict=True)):
        wanted = shares_of(whole_answer(reference_attention, Whole.of(case, torch.float64)), group.rank(), case)
        out_BlNH, leaves, _ = kept[i]
        got = dict(zip(("out", "dq", "dk", "dv"), (out_BlNH.detach(), *map(grad_of, leaves)), strict=True))
        failures += [f"{name} of {i}" for name in got if not difference(got[name], wanted[name]) <= TOLERANCE]
    dist.destroy_process_group(pair)
    return failures


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("backward_order", list(permutations(range(3))))
def test_modules_of_different_heads_and_groups_interleave(
    rank_pool: RankPool, backward_order: tuple[int, ...]
) -> None:
    """Invariant 6, B3."""
    assert rank_pool.run(interleaved, 4, backward_order) == [[]] * 4
