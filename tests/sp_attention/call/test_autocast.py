"""torch.autocast: what scaled_dot_product_attention does with it on one rank, for every option, on every rank.

It casts q, k and v, but not float64. A rank without heads never calls it, and has to send and expect the same bytes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.testing import RankPool
from sp_attention import flex_attend, scaled_dot_product, ulysses_attention
from tests.sp_attention.call import test_ulysses as test_ulysses_attention
from tests.sp_attention.call.test_errors import right_call
from tests.sp_attention.call.test_ulysses import (
    KINDS,
    Case,
    Whole,
    named_case,
    same_bits,
    shares_of,
    shares_of_ulysses,
    whole_answer,
)
from tests.sp_attention.call.test_ulysses import reference_attention as reference

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
HEADS = {"a rank without heads": (0, 4), "all ranks with heads": (2, 2), "a shared key/value head": (1, 3)}


def cases(heads: tuple[int, ...]) -> list[Case]:
    square = [named_case(2, kind, (3, 4), num_heads=(4, 2), widths=(6, 4), kv_seq=(3, 4)) for kind in SOME]
    packed = [named_case(2, kind, (8, 9), batch=1, num_heads=(4, 2)) for kind in ("packed", "masked documents")]
    return [replace(case, heads=heads) for case in [*square, *packed]]


def in_autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


def shares_in_autocast(rank: int, case: Case, whole: Whole, dtype: torch.dtype) -> dict[str, Tensor]:
    """Forward in autocast, backward after it, as training does."""

    def attention(*qkv: Tensor, **options: Any) -> Tensor:
        with in_autocast(dtype):
            return ulysses_attention(*qkv, **options)

    with mock.patch.object(test_ulysses_attention, "ulysses_attention", attention):
        return shares_of_ulysses(rank, case, whole)


def cast(whole: Whole, dtype: torch.dtype) -> Whole:
    tensors = {name: getattr(whole, name).to(dtype) for name in ("q_BLNH", "k_BLGH", "v_BLGH", "grad_BLNH")}
    return replace(whole, **tensors)


# ---- cases: what the ranks run -------------------------------------------------------------------------


def as_if_cast(rank: int, batch: list[Case], dtype: torch.dtype) -> list[str]:
    """What differs from casting q, k and v by hand, in bits: so what is written in float32 stays in float32."""
    failures = []
    for case in batch:
        whole = Whole.of(case, torch.float32)
        got = shares_in_autocast(rank, case, whole, dtype)
        wanted = shares_of_ulysses(rank, case, cast(whole, dtype))
        wanted |= {name: wanted[name].float() for name in ("dq", "dk", "dv")}
        failures += [f"{name}: {case}" for name in got if not same_bits(got[name], wanted[name])]
        exact = shares_of(whole_answer(reference, cast(whole, torch.float64)), rank, case)
        failures += [f"{name} far off: {case}" for name in got if not near(got[name], exact[name])]
    return failures


def near(got: Tensor, wanted: Tensor) -> bool:
    return got.numel() == 0 or bool(((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)) < 0.03)


def float64_stays(rank: int, batch: list[Case]) -> list[str]:
    failures = []
    for case in batch:
        whole = Whole.of(case, torch.float64)
        wanted = shares_of_ulysses(rank, case, whole)
        got = shares_in_autocast(rank, case, whole, torch.bfloat16)
        failures += [f"{name}: {case}" for name in got if not same_bits(got[name], wanted[name])]
    return failures


def dropped(rank: int) -> tuple[torch.dtype, bool]:
    """The dtype, and whether the pattern is that without autocast."""
    arguments: dict[str, Any] = right_call(rank) | {"dropout_p": 0.5}
    torch.manual_seed(1)
    wanted = ulysses_attention(**(arguments | bfloat16(arguments, "qkv")))
    torch.manual_seed(1)
    with in_autocast(torch.bfloat16):
        got = ulysses_attention(**arguments)
    return got.dtype, torch.equal(got, wanted)


def bfloat16(arguments: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: x.bfloat16() for name, x in arguments.items() if name[0] in names and isinstance(x, Tensor)}


def mixed(rank: int) -> tuple[torch.dtype, str]:
    """Queries in float32, of a norm say, beside bfloat16: the dtype in autocast, and what is told without."""
    arguments = right_call(rank)
    arguments |= bfloat16(arguments, "kv")
    with in_autocast(torch.bfloat16):
        out_BlNH = ulysses_attention(**arguments)
    with pytest.raises(ValueError, match="cast them to one floating-point dtype") as error:
        ulysses_attention(**arguments)
    return out_BlNH.dtype, str(error.value)


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEADS)
def test_autocast_is_casting_q_k_and_v(rank_pool: RankPool, name: str, dtype: torch.dtype) -> None:
    """And the output has that dtype, whatever the options, on every rank."""
    assert rank_pool.run(as_if_cast, 2, cases(HEADS[name]), dtype) == [[], []]


def test_autocast_leaves_float64_alone(rank_pool: RankPool) -> None:
    assert rank_pool.run(float64_stays, 2, cases((0, 4))) == [[], []]


def test_dropout_in_autocast(rank_pool: RankPool) -> None:
    assert rank_pool.run(dropped, 2) == [(torch.bfloat16, True)] * 2


def test_autocast_makes_one_dtype_of_several(rank_pool: RankPool) -> None:
    text = "q, k, v are torch.float32, torch.bfloat16, torch.bfloat16; cast them to one floating-point dtype"
    told = f"rank 0: {text}; rank 1: {text}"
    assert rank_pool.run(mixed, 2) == [(torch.bfloat16, told)] * 2


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
