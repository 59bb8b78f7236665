"""Packed sequences: the work is per document."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dispatch import Partition
from moe_dispatch.testing import RankPool
from tests.support.attention.packed import attended, tensors
from tests.support.ranks import world


class Largest(TorchDispatchMode):
    """The largest tensor, and the largest matrix of scores, that any operation made, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.squares = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
                if min(x.shape[-2:], default=0) > 8 and x.ndim >= 2:  # wider than a head: queries x keys
                    self.squares = max(self.squares, x.shape[-1] * x.shape[-2])
        return result


@contextmanager
def measured() -> Iterator[Largest]:
    with Largest() as largest:
        yield largest


# ---- cases: what the ranks run -------------------------------------------------------------------------


def memory(rank: int, length: int, document: int) -> tuple[int, int]:
    """Elements of the largest tensor, and of the largest matrix of scores, for documents of one length."""
    seq = tuple(Partition.balanced(length, world().size()).sizes)
    cu_seqlens = torch.arange(0, length + 1, document)
    sinks_N = torch.zeros(4, dtype=torch.float64, requires_grad=True)  # the softmax by hand: its matrices are seen
    whole = tensors(length)
    with measured() as largest:
        attended(rank, seq, whole, cu_seqlens=cu_seqlens, is_causal=True, sinks_N=sinks_N)
    return largest.numel, largest.squares


# ---- what the tests ask --------------------------------------------------------------------------------


def test_memory_grows_with_the_longest_document(rank_pool: RankPool) -> None:
    """Matrices of scores have the size of a document; everything else grows as the tokens do."""
    lengths = [256, 512, 1024]
    (short, *_), (long, *_), (longest, *_) = (rank_pool.run(memory, 2, length, 32) for length in lengths)
    assert short[1] == long[1] == longest[1] == 32 * 33  # with the sink's column
    for (smaller, _), (larger, _) in pairwise([short, long, longest]):
        assert larger <= 2 * smaller
    (of_one_document, square), *_ = rank_pool.run(memory, 2, 512, 512)
    assert square == 512 * 513
    assert of_one_document >= 2 * 512 * 513  # two heads on this rank: what the other cases do not have
