"""UlyssesAttention and AttentionOverRanks: the user's own ``attend``, and no option lost on the way."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import AttentionOverRanks, Scheme, UlyssesAttention, attention_over_ranks, ulysses_attention
from tests.support.attention.case import Attend, Case, Options, named_case
from tests.support.attention.whole import Whole, shares_of, whole_answer
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE, Order, difference, grad_of, leaf, share


def softcapped(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, *, scale: float = 1.0, cap: float = 2.0) -> Tensor:
    """A user's own ``attend``: products squashed to within the cap, and a bias that grows with distance."""
    repeats = q_BLnH.shape[2] // k_BLgH.shape[2]
    k_BLnH, v_BLnH = (x.repeat_interleave(repeats, dim=2) for x in (k_BLgH, v_BLgH))
    product_BnLL = cap * torch.tanh(torch.einsum("bqnh,bknh->bnqk", q_BLnH, k_BLnH) * scale / cap)
    place_L = torch.arange(k_BLgH.shape[1])
    bias_LL = -(place_L[-q_BLnH.shape[1] :, None] - place_L).abs()
    return torch.einsum("bnqk,bknh->bqnh", (product_BnLL + bias_LL).softmax(-1), v_BLnH)


def calls_of_a_module() -> list[tuple[Case, Options, Options]]:
    """Each option of the module, and of its calls."""
    case = named_case(2, "cross bool", (2, 5), num_heads=(4, 2), batch=1, kv_seq=(3, 4))
    square = named_case(2, "none", (2, 5), num_heads=(4, 2), batch=1)
    keep_BL = torch.arange(7).unsqueeze(0) % 3 > 0
    return [
        (square, {"is_causal": True}, {}),
        (square, {"window": (1, 1)}, {}),
        (square, {"scale": 0.1}, {}),
        (square, {"heads": Partition((1, 3))}, {}),
        (square, {"attend": softcapped}, {}),
        (square, {}, {"attn_mask": keep_BL}),
        (square, {}, {"key_padding_mask": keep_BL}),
        (square, {}, {"cu_seqlens": torch.tensor([0, 3, 7])}),
        (square, {}, {"cu_seqlens": torch.tensor([0, 2, 5]), "cu_seqlens_padded": torch.tensor([0, 3, 7])}),
        (square, {}, {"sinks_N": torch.ones(4, dtype=torch.float64)}),
        (case, {"is_causal": True}, {"kv_sharding": TokenSharding(batch=1, seq=Partition((3, 4)))}),
    ]


# ---- cases: what the ranks run -------------------------------------------------------------------------


def own_attend(rank: int, case: Case) -> list[str]:
    """What differs with an ``attend`` of the user's, through the module."""
    whole = Whole.of(case, torch.float64)
    wanted = shares_of(whole_answer(softcapped, whole), rank, case)
    parts = [leaf(share(x, case.seq, case.order, rank)) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
    module = UlyssesAttention(group=world(), attend=softcapped, scale=case.scale)
    sharding = TokenSharding(batch=case.batch, seq=Partition(case.seq), order=case.order)
    out_BlNH = module(*parts, sharding=sharding)
    out_BlNH.backward(share(whole.grad_BLNH, case.seq, case.order, rank))
    got = dict(zip(("out", "dq", "dk", "dv"), (out_BlNH.detach(), *map(grad_of, parts)), strict=True))
    return [name for name in got if not difference(got[name], wanted[name]) <= TOLERANCE]


def module_equals_function(rank: int, over_ranks: bool) -> list[str]:
    """Which options the module loses on the way: each changes the bits of the output, and as the function does. In
    eval mode too, where dropout is off and nothing else is."""
    attention: Attend = ulysses_attention
    make: Callable[..., AttentionOverRanks] = UlyssesAttention
    if over_ranks:  # in tiles, not as Ulysses itself
        scheme = Scheme.ulysses(keep=False)
        attention, make = partial(attention_over_ranks, scheme=scheme), partial(AttentionOverRanks, scheme=scheme)
    failures = []
    for case, choices, facts in calls_of_a_module():
        whole = Whole.of(case, torch.float64)
        sizes = (case.seq, case.kv_seq, case.kv_seq)
        parts = [
            share(x, n, "BL", rank) for x, n in zip((whole.q_BLNH, whole.k_BLGH, whole.v_BLGH), sizes, strict=True)
        ]
        shared = {"sharding": TokenSharding(batch=1, seq=Partition(case.seq))}
        shared |= {name: value for name, value in facts.items() if name == "kv_sharding"}
        plain_BlNH = attention(*parts, group=world(), **shared)
        wanted_BlNH = attention(*parts, group=world(), **shared | choices | facts)
        got_BlNH = deepcopy(make(group=world(), **choices))(*parts, **shared | facts)  # as of an averaged model
        changed = "heads" in choices or not torch.equal(got_BlNH, plain_BlNH)
        failures += [f"{choices} {facts}"] * (not changed or not torch.equal(got_BlNH, wanted_BlNH))
        evaluated_BlNH = make(group=world(), dropout_p=0.9, **choices).eval()(*parts, **shared | facts)
        failures += [f"{choices} {facts} in eval mode"] * (not torch.equal(evaluated_BlNH, wanted_BlNH))
    return failures


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["BL", "LB"])
def test_attend_is_the_users_own(rank_threads: RankThreads, order: Order) -> None:
    case = named_case(3, "none", (4, 0, 3), num_heads=(6, 2), order=order, scale=0.7)
    assert rank_threads.run(own_attend, 3, case) == [[]] * 3


@pytest.mark.parametrize("over_ranks", [False, True])
def test_the_module_loses_no_option(rank_threads: RankThreads, over_ranks: bool) -> None:
    """Invariant 11. B5: masks and windows stay in eval mode."""
    assert rank_threads.run(module_equals_function, 2, over_ranks) == [[]] * 2
