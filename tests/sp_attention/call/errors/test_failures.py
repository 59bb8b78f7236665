"""An ``attend`` that fails on some ranks: the same error on all of them, those without heads too, and a group that
works after. Its peers wait for its output."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import Statement
from moe_dispatch.testing import RankPool
from sp_attention import ulysses_attention
from sp_attention.call.words import check_words
from tests.support.ranks import refusal, world
from tests.support.tensors import grad_of, leaf

SEQ = (2, 3, 2)  # three ranks; batch 2, 2 query heads and one key/value head, widths 6 and 4


def values(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    return v_BLgH.expand(-1, -1, q_BLnH.shape[2], -1) + q_BLnH.sum(-1, keepdim=True) * k_BLgH.sum(-1, keepdim=True)


def raises(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    raise RuntimeError("out of luck")


def raises_a_key(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    raise KeyError("cache")


def queries(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    return q_BLnH


def heads_first(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    return values(q_BLnH, k_BLgH, v_BLgH).transpose(1, 2)


def double(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    return values(q_BLnH, k_BLgH, v_BLgH).double()


def with_statistics(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> tuple[Tensor, Tensor]:
    return values(q_BLnH, k_BLgH, v_BLgH), q_BLnH


def nothing(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> None:
    return None


WANTED = "it has to give (B, L, my query heads, value width) = (2, 7, 1, 4) of torch.float32"
# What attend does, and what every rank is told after "rank _: ".
FAILURES: dict[str, tuple[Callable[..., object], str]] = {
    "an error": (raises, "attend raised RuntimeError: out of luck"),
    "an error of another kind": (raises_a_key, "attend raised KeyError: 'cache'"),
    "another width": (queries, f"attend gave (2, 7, 1, 6) of torch.float32; {WANTED}"),
    "another layout": (heads_first, f"attend gave (2, 1, 7, 4) of torch.float32; {WANTED}"),
    "another dtype": (double, f"attend gave (2, 7, 1, 4) of torch.float64; {WANTED}"),
    "a tuple": (with_statistics, f"attend gave tuple; {WANTED}"),
    "nothing": (nothing, f"attend gave NoneType; {WANTED}"),
}


def call(
    rank: int, attend: Callable[..., object], heads: tuple[int, ...] = (1, 0, 1), batch: int = 2, **options: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The output, and the leaves."""
    shape = batch, SEQ[rank]
    draw = torch.Generator().manual_seed(rank)
    leaves = [leaf(torch.randn(*shape, n, width, generator=draw)) for n, width in ((2, 6), (1, 6), (1, 4))]
    sharding = TokenSharding(batch=batch, seq=Partition(SEQ))
    out_BlNH = ulysses_attention(
        *leaves,
        sharding=sharding,
        group=world(),
        heads=Partition(heads),
        attend=attend,  # type: ignore[arg-type]
        **options,
    )
    return out_BlNH, leaves


def works(rank: int) -> bool:
    """The group, after an error: forward, backward, and a collective of another kind."""
    out_BlNH, leaves = call(rank, values)
    out_BlNH.sum().backward()
    total = torch.ones(())
    dist.all_reduce(total)
    return total.item() == 3 and all(bool(grad_of(x).any()) for x in leaves)


def failure(rank: int, name: str, failing: tuple[int, ...]) -> tuple[str, str, bool]:
    """What this rank is told, what that comes from, and whether the group works afterwards."""
    attend = FAILURES[name][0] if rank in failing else values
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller compares the whole text)
        call(rank, attend)
    return str(error.value), repr(error.value.__cause__), works(rank)


def failure_in_documents(rank: int) -> tuple[str, bool]:
    """In the second document, on the rank that has the head."""
    attend = OnCall(1)
    documents = torch.tensor([0, 3, 7])
    text = refusal(lambda: call(rank, attend, heads=(0, 0, 2), batch=1, cu_seqlens=documents))
    return text, works(rank)


def failure_in_recomputation(rank: int) -> tuple[str, bool]:
    """On rank 2 alone, in backward: the second call of its attend."""
    attend = OnCall(1 if rank == 2 else 100)
    x = leaf(torch.ones(()))

    def scaled(factor: Tensor) -> Tensor:
        out_BlNH, _ = call(rank, attend)
        return (out_BlNH * factor).exp()  # its gradient needs the output of the attention

    loss = checkpoint(scaled, x, use_reentrant=False).sum()
    return refusal(loss.backward), works(rank)


class OnCall:
    """``values``, that fails on call ``number``."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
        self.left -= 1
        return raises(q_BLnH, k_BLgH, v_BLgH) if self.left == -1 else values(q_BLnH, k_BLgH, v_BLgH)


@pytest.mark.parametrize("failing", [(0, 2), (2,)])
@pytest.mark.parametrize("name", FAILURES)
def test_an_attend_that_fails_is_everyones_error(rank_pool: RankPool, name: str, failing: tuple[int, ...]) -> None:
    """Rank 1 has no head, so it never calls attend."""
    told = "; ".join(f"rank {rank}: {FAILURES[name][1]}" for rank in failing)
    causes = {"an error": "RuntimeError('out of luck')", "an error of another kind": "KeyError('cache')"}
    cause = [causes.get(name, "None") if rank in failing else "None" for rank in range(3)]
    assert rank_pool.run(failure, 3, name, failing) == [(told, cause[rank], True) for rank in range(3)]


def test_an_attend_that_fails_in_a_document(rank_pool: RankPool) -> None:
    told = "rank 2: attend raised RuntimeError: out of luck"
    assert rank_pool.run(failure_in_documents, 3) == [(told, True)] * 3


def test_an_attend_that_fails_when_it_is_recomputed(rank_pool: RankPool) -> None:
    told = "rank 2: attend raised RuntimeError: out of luck"
    assert rank_pool.run(failure_in_recomputation, 3) == [(told, True)] * 3


def test_where_reading_words_would_wait_for_the_device_the_rank_itself_still_says_what_is_wrong() -> None:
    """Its peers have a device assertion. The meta device stands for one that is not the CPU."""

    class Group:
        def rank(self) -> int:
            return 3

    word_P, cause = torch.zeros(4, dtype=torch.int64, device="meta"), KeyError("cache")
    check_words(word_P, Statement("facts"), Group())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^rank 3: no window$") as error:
        check_words(word_P, Statement("facts", "no window", cause), Group())  # type: ignore[arg-type]
    assert error.value.__cause__ is cause
