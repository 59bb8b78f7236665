"""Both ``attend`` in torch.autocast, on one rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sp_attention import flex_attend, scaled_dot_product
from tests.support.attention.case import named_case
from tests.support.attention.masks import KINDS
from tests.support.attention.whole import Whole
from tests.support.tensors import same_bits

SOME = (
    "none",
    "causal",
    "window",
    "right pad",
    "bool (BNLL)",
    "float (BNLL)",
    "sinks",
    "sinks and mask",
    "cross sinks",
)


def in_autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", [kind for kind in SOME if kind != "cross sinks"])
def test_the_default_attend_gives_the_dtype_of_torchs(kind: str, dtype: torch.dtype) -> None:
    case = named_case(1, kind, (5,), num_heads=(4, 2))
    whole = Whole.of(case, dtype)
    options = KINDS[kind](case, torch.Generator().manual_seed(0))
    if "sinks_N" in options:
        options["sinks_n"] = options.pop("sinks_N")
    q_BnLH, k_BgLH, v_BgLH = (x.transpose(1, 2) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH))
    with in_autocast(torch.bfloat16):
        wanted = F.scaled_dot_product_attention(q_BnLH, k_BgLH, v_BgLH, enable_gqa=True)
        got = scaled_dot_product(whole.q_BLNH, whole.k_BLGH, whole.v_BLGH, **options)
    assert got.dtype == wanted.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_flex_attention_in_autocast(mode: Callable[[], Any]) -> None:
    """Evaluated on whole tensors, where there are gradients: in float32 inside."""
    whole = Whole.of(named_case(1, "none", (5,), num_heads=(4, 2)), torch.bfloat16)
    tensors = whole.q_BLNH, whole.k_BLGH, whole.v_BLGH
    with mode():
        wanted = flex_attend()(*tensors, is_causal=True)
        with in_autocast(torch.bfloat16):
            got = flex_attend()(*tensors, is_causal=True)
    assert same_bits(got, wanted)
