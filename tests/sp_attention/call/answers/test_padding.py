"""Padding told in every form of a mask: results are those of the tokens without it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import ulysses_attention
from sp_attention.reference import reference_attention
from tests.support.attention.case import Options, named_case
from tests.support.attention.whole import Whole, whole_answer
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE, difference, grad_of, leaf, share


def padding_forms(length: int) -> dict[str, Options]:
    """Of 2 rows with 5 real tokens."""
    keep_BL = (torch.arange(length) < 5).expand(2, length)
    keep_B1LL = keep_BL[:, None, None, :] & keep_BL[:, None, :, None]
    added_B11L, added_B1LL = (
        torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)
        for keep in (keep_BL[:, None, None], keep_B1LL)
    )
    return {
        "(B, L)": {"key_padding_mask": keep_BL},
        "(B, 1, 1, L)": {"attn_mask": keep_BL[:, None, None]},
        "(B, 1, L, L)": {"attn_mask": keep_B1LL},
        "added (B, 1, 1, L)": {"attn_mask": added_B11L},
        "added (B, 1, L, L)": {"attn_mask": added_B1LL},
    }


def padded_to(x_BLNH: Tensor, length: int) -> Tensor:
    return F.pad(x_BLNH, (0, 0, 0, 0, 0, length - x_BLNH.shape[1]))


# ---- cases: what the ranks run -------------------------------------------------------------------------


def masks_in_every_form(rank: int, length: int) -> list[str]:
    """What differs, with 5 tokens padded to ``length`` and told so in some form, from the 5 tokens alone; and what at
    padding is not exactly 0."""
    case = named_case(2, "none", (3, length - 3), batch=2, num_heads=(4, 2), widths=(6, 4))
    whole = Whole.of(case, torch.float64)
    short = replace(
        whole, **{name: getattr(whole, name)[:, :5] for name in ("q_BLNH", "k_BLGH", "v_BLGH", "grad_BLNH")}
    )
    short_answer = whole_answer(reference_attention, short)
    sharding = TokenSharding(batch=2, seq=Partition(case.seq))
    real_l = share(torch.arange(length)[None] < 5, case.seq, "BL", rank)[0]
    failures = []
    for form, options in padding_forms(length).items():
        for at_padding in (0.0, 1.0):  # of the gradient that comes in
            leaves = [leaf(share(x, case.seq, "BL", rank)) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
            out_BlNH = ulysses_attention(*leaves, sharding=sharding, group=world(), **options)
            grad_BLNH = whole.grad_BLNH.clone()
            grad_BLNH[:, 5:] *= at_padding
            out_BlNH.backward(share(grad_BLNH, case.seq, "BL", rank))
            names = ["out", "dq", "dk", "dv"]
            got = dict(zip(names, (out_BlNH.detach(), *map(grad_of, leaves)), strict=True))
            sees_nothing = "L, L" in form  # else queries at padding see the real keys
            exact = ["dk", "dv", *["dq"] * (sees_nothing or not at_padding), *["out"] * sees_nothing]
            failures += [f"{name} at padding: {form}" for name in exact if got[name][:, ~real_l].any()]
            if sees_nothing or not at_padding:
                wanted = {name: share(padded_to(x, length), case.seq, "BL", rank) for name, x in short_answer.items()}
                failures += [
                    f"{name}: {form}"
                    for name in got
                    if not difference(got[name][:, real_l], wanted[name][:, real_l]) <= TOLERANCE
                ]
    return failures


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [6, 8, 16])
def test_report_3_padding_in_every_form_of_mask(rank_threads: RankThreads, length: int) -> None:
    """Report 3, 3, 5 and 6: output and gradients are those of the tokens without padding, and padding has none: of
    keys and values in any case, of queries where nothing comes in for them."""
    assert rank_threads.run(masks_in_every_form, 2, length) == [[]] * 2
