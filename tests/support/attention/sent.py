"""The all-to-alls of a block of code, and their bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from moe_dispatch.testing.counting import counting

ALL_TO_ALL = "c10d::alltoall_base_"


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes of one collective, for each rank."""

    to: tuple[int, ...]
    back: tuple[int, ...]


@contextmanager
def counted(sums: int = 0) -> Iterator[list[Sent]]:
    """Record each all-to-all and hand it on. There may be no other collective, but for so many sums at the end."""
    sent: list[Sent] = []
    trade = dist.all_to_all_single

    def count(out: Tensor, rows: Tensor, received: list[int], given: list[int], **options: Any) -> Any:
        row_bytes = rows[:0].numel() or rows.element_size() * (rows.numel() // max(len(rows), 1) or 1)
        sent.append(Sent(tuple(n * row_bytes for n in given), tuple(n * row_bytes for n in received)))
        return trade(out, rows, received, given, **options)

    with mock.patch.object(dist, "all_to_all_single", count), counting() as counts:
        yield sent
    assert counts.collectives == [ALL_TO_ALL] * len(sent) + ["c10d::allreduce_"] * sums
