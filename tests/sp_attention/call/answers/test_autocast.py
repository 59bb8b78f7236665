"""torch.autocast: what scaled_dot_product_attention does with it on one rank, for every option, on every rank.

It casts q, k and v, but not float64. A rank without heads never calls it, and has to send and expect the same bytes.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch.testing import RankPool
from sp_attention import ulysses_attention
from sp_attention.reference import reference_attention
from tests.support.attention.case import Case, named_case
from tests.support.attention.whole import Whole, shares_of, shares_of_ulysses, whole_answer
from tests.support.attention.wrong_calls import right_call
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
HEADS = {"a rank without heads": (0, 4), "all ranks with heads": (2, 2), "a shared key/value head": (1, 3)}


def cases(heads: tuple[int, ...]) -> list[Case]:
    square = [named_case(2, kind, (3, 4), num_heads=(4, 2), widths=(6, 4), kv_seq=(3, 4)) for kind in SOME]
    packed = [named_case(2, kind, (8, 9), batch=1, num_heads=(4, 2)) for kind in ("packed", "masked documents")]
    return [replace(case, heads=heads) for case in [*square, *packed]]


def in_autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


def cast(whole: Whole, dtype: torch.dtype) -> Whole:
    tensors = {name: getattr(whole, name).to(dtype) for name in ("q_BLNH", "k_BLGH", "v_BLGH", "grad_BLNH")}
    return replace(whole, **tensors)


def near(got: Tensor, wanted: Tensor) -> bool:
    return got.numel() == 0 or bool(((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)) < 0.03)


def bfloat16(arguments: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: x.bfloat16() for name, x in arguments.items() if name[0] in names and isinstance(x, Tensor)}


# ---- cases: what the ranks run -------------------------------------------------------------------------


def shares_in_autocast(rank: int, case: Case, whole: Whole, dtype: torch.dtype) -> dict[str, Tensor]:
    """Forward in autocast, backward after it, as training does."""

    def attention(*qkv: Tensor, **options: Any) -> Tensor:
        with in_autocast(dtype):
            return ulysses_attention(*qkv, **options)

    return shares_of_ulysses(rank, case, whole, attention=attention)


def as_if_cast(rank: int, batch: list[Case], dtype: torch.dtype) -> list[str]:
    """What differs from casting q, k and v by hand, in bits: so what is written in float32 stays in float32."""
    failures = []
    for case in batch:
        whole = Whole.of(case, torch.float32)
        got = shares_in_autocast(rank, case, whole, dtype)
        wanted = shares_of_ulysses(rank, case, cast(whole, dtype))
        wanted |= {name: wanted[name].float() for name in ("dq", "dk", "dv")}
        failures += [f"{name}: {case}" for name in got if not same_bits(got[name], wanted[name])]
        exact = shares_of(whole_answer(reference_attention, cast(whole, torch.float64)), rank, case)
        failures += [f"{name} far off: {case}" for name in got if not near(got[name], exact[name])]
    return failures


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
