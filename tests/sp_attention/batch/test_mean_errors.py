"""What one rank passes wrong to the mean losses is everyone's error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch.testing import RankPool
from sp_attention import mean_cross_entropy, mean_loss
from tests.support.attention.batches import NONE
from tests.support.ranks import refusal, world

VOCAB, WIDTH, HEADS, GROUPS = 11, 12, 3, 1
IDS = torch.zeros(1, 2, dtype=torch.int64)
OUTSIDE = torch.tensor([[NONE, VOCAB]])
BAD_LOSSES = {
    "losses are (1, 3) of torch.float32 for targets (1, 2)": (torch.ones(1, 3), IDS),
    "losses are () of torch.float32 for targets (1, 2)": (torch.ones(()), IDS),
    "losses are (1, 2) of torch.int64 for targets (1, 2)": (torch.ones(1, 2).long(), IDS),
    "targets are torch.float32; they have to be ints": (torch.ones(1, 2), torch.zeros(1, 2)),
    "targets are on meta, but what they are for on cpu; move them there": (torch.ones(1, 2), IDS.to("meta")),
}
BAD_LOGITS = {
    "logits are (1, 3, 11) of torch.float32 for targets (1, 2)": (torch.ones(1, 3, VOCAB), IDS),
    "logits are (1, 2, 11) of torch.int64 for targets (1, 2)": (torch.ones(1, 2, VOCAB).long(), IDS),
    "targets are torch.bool; they have to be ints": (torch.ones(1, 2, VOCAB), IDS.bool()),
    "targets are on meta, but what they are for on cpu; move them there": (torch.ones(1, 2, VOCAB), IDS.to("meta")),
    "logits are (11,) of torch.float32 for targets ()": (torch.ones(VOCAB), torch.tensor(1)),
    "logits are () of torch.float32 for targets ()": (torch.ones(()), torch.tensor(1)),
    "target 11 for logits of 11 tokens; it has to be 0 to 10, or ignore_index = -100": (
        torch.ones(1, 2, VOCAB),
        OUTSIDE,
    ),
    "target -3 for logits of 11 tokens": (torch.ones(1, 2, VOCAB), IDS - 3),
}


def refused(rank: int, mean: Callable[..., Any], bad: tuple[Tensor, Tensor]) -> str:
    """On rank 1 alone something is wrong."""
    good = torch.ones(1, 2, VOCAB) if mean is mean_cross_entropy else torch.ones(1, 2)
    values, targets = bad if rank == 1 else (good, IDS)
    return refusal(lambda: mean(values, targets, group=world()))


@pytest.mark.parametrize(
    ("mean", "text", "bad"),
    [(mean_loss, *item) for item in BAD_LOSSES.items()]
    + [(mean_cross_entropy, *item) for item in BAD_LOGITS.items()],
)
def test_what_one_rank_has_wrong_is_everyones_error(
    mean: Callable[..., Any], text: str, bad: tuple[Tensor, Tensor], rank_pool: RankPool
) -> None:
    texts = rank_pool.run(refused, 3, mean, bad)
    assert len(set(texts)) == 1
    assert texts[0].startswith(f"rank 1: {text}")


def test_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group is None; pass the process group explicitly"):
        mean_loss(torch.ones(2), torch.zeros(2, dtype=torch.int64), group=None)  # type: ignore[arg-type]
