"""A right call on two ranks, to be made wrong; and whether the group works after an error."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from sp_attention import ulysses_attention
from sp_attention.reference import reference_attention
from tests.support.ranks import refusal, world
from tests.support.tensors import share

SEQ = (3, 4)  # two ranks; batch 2, 4 query and 2 key/value heads, widths 6 and 4
Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


def right_call(rank: int, batch: int = 2) -> Arguments:
    draw = torch.Generator().manual_seed(0)
    shapes = {"q_BlNH": (4, 6), "k_BlGH": (2, 6), "v_BlGH": (2, 4)}
    wholes = {name: torch.randn(batch, sum(SEQ), *shape, generator=draw) for name, shape in shapes.items()}
    parts = {name: share(whole, SEQ, "BL", rank) for name, whole in wholes.items()}
    return {**parts, "sharding": TokenSharding(batch=batch, seq=Partition(SEQ)), "group": world()}


def call(arguments: Arguments) -> Tensor:
    return ulysses_attention(**arguments)


def told(arguments: Arguments) -> str:
    """The text of the refusal."""
    return refusal(lambda: call(arguments))


def works(rank: int) -> bool:
    """The group, after an error: a call, and a collective of another kind."""
    arguments = right_call(rank)
    draw = torch.Generator().manual_seed(0)
    wholes = [torch.randn(2, sum(SEQ), *shape, generator=draw) for shape in ((4, 6), (2, 6), (2, 4))]
    total = torch.ones(())
    dist.all_reduce(total)
    wanted_BlNH = share(reference_attention(*wholes), SEQ, "BL", rank)
    return total.item() == 2 and torch.allclose(call(arguments), wanted_BlNH, atol=1e-5)


def mask(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def documents(ends: list[int], starts: list[int] | None = None) -> Arguments:
    return {"cu_seqlens": torch.tensor(ends)} | ({"cu_seqlens_padded": torch.tensor(starts)} if starts else {})
