"""Attention of parts of the keys, merged, is attention of all of them."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sp_attention.blocks.merge import merge, weight
from sp_attention.blocks.sinks import with_sinks

CUTS = [(0, 6), (0, 2, 6), (0, 1, 2, 3, 4, 5, 6)]


def products_and_values() -> tuple[Tensor, Tensor]:
    """(B, n, Lq, Lk) with queries that see few keys or none, and (B, n, Lk, H)."""
    draw = torch.Generator().manual_seed(0)
    products_BnLL = 5 * torch.randn(2, 3, 4, 6, generator=draw, dtype=torch.float64)
    products_BnLL[0, 0, 1] = -torch.inf
    products_BnLL[0, 1, 2, :4] = -torch.inf
    products_BnLL[1, 2, 3, 2:] = -torch.inf
    return products_BnLL, torch.randn(2, 3, 6, 5, generator=draw, dtype=torch.float64)


def part(products_BnLL: Tensor, values_BnLH: Tensor) -> tuple[Tensor, Tensor]:
    """Of some keys: 0 and -inf where there is none."""
    lse_BnL = products_BnLL.logsumexp(-1)
    weights_BnLL = (products_BnLL - lse_BnL.unsqueeze(-1)).exp().nan_to_num(0.0)
    return weights_BnLL @ values_BnLH, lse_BnL


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("shift", [0.0, 700.0, -700.0])
def test_merged_parts_are_the_whole(cuts: tuple[int, ...], shift: float) -> None:
    """Also where sums of powers would be too large or too small for a float."""
    products_BnLL, values_BnLH = products_and_values()
    products_BnLL = products_BnLL + shift
    out_BnLH, lse_BnL = torch.zeros(2, 3, 4, 5).double(), torch.full((2, 3, 4), -torch.inf).double()
    for start, end in pairwise(cuts):
        merge(out_BnLH, lse_BnL, *part(products_BnLL[..., start:end], values_BnLH[:, :, start:end]))
    wanted_BnLH, wanted_lse_BnL = part(products_BnLL, values_BnLH)
    torch.testing.assert_close(out_BnLH, wanted_BnLH, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse_BnL, wanted_lse_BnL, rtol=0, atol=1e-12)
    assert not out_BnLH[0, 0, 1].any()
    assert lse_BnL[0, 0, 1] == -torch.inf


def test_the_order_of_merging_decides_the_bits_only() -> None:
    products_BnLL, values_BnLH = products_and_values()
    merged = []
    for order in ((0, 1, 2), (2, 0, 1)):
        out_BnLH, lse_BnL = torch.zeros(2, 3, 4, 5).double(), torch.full((2, 3, 4), -torch.inf).double()
        for i in order:
            keys = slice(2 * i, 2 * i + 2)
            merge(out_BnLH, lse_BnL, *part(products_BnLL[..., keys], values_BnLH[:, :, keys]))
        merged.append(out_BnLH)
    torch.testing.assert_close(*merged, rtol=0, atol=1e-13)


def test_sinks_are_one_key_more() -> None:
    products_BnLL, values_BnLH = products_and_values()
    sinks_n = torch.tensor([0.5, -torch.inf, 3.0], dtype=torch.float64)
    out_BnLH, lse_BnL = part(products_BnLL, values_BnLH)
    whole_BnL = with_sinks(lse_BnL, sinks_n)
    sink_BnL1 = sinks_n[None, :, None, None].expand(2, 3, 4, 1)
    wanted_BnLH, wanted_BnL = part(
        torch.cat([products_BnLL, sink_BnL1], dim=-1), torch.cat([values_BnLH, torch.zeros(2, 3, 1, 5)], dim=2)
    )
    torch.testing.assert_close(whole_BnL, wanted_BnL, rtol=0, atol=1e-12)
    got_BnLH = out_BnLH * weight(lse_BnL, whole_BnL).unsqueeze(-1)
    torch.testing.assert_close(got_BnLH, wanted_BnLH, rtol=0, atol=1e-12)
    assert with_sinks(lse_BnL, None) is lse_BnL


def test_half_precision_parts_are_summed_in_the_wide_dtype() -> None:
    """1 + 2 ** -8 is no bfloat16 number."""
    out_BnLH, lse_BnL = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), -torch.inf)
    for value in (1.0, 1.0 + 2**-7):
        merge(out_BnLH, lse_BnL, torch.full((1, 1, 1, 1), value).bfloat16(), torch.zeros(1, 1, 1))
    assert out_BnLH.item() == pytest.approx(1 + 2**-8, abs=1e-6)
