"""A case in a scheme and in an order of tokens, and what of it differs from the reference on one rank."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import Scheme, attention_over_ranks
from tests.support.attention.case import Attend, Case
from tests.support.attention.equal import answer_of
from tests.support.attention.masks import CROSS
from tests.support.attention.whole import Whole
from tests.support.orders import cut_by_loops
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE, difference, grad_of, leaf

CHUNKS = (3, 2**40)
ORDERS = ("contiguous", "zigzag", "striped", "any")


def schemes(ranks: int) -> list[Scheme]:
    """Every scheme that so many ranks can have; those of one rank alone are Ulysses."""
    found = [Scheme.ulysses()]
    for chunk, keep in product(CHUNKS, (False, True)):
        found += [Scheme.gather(keep=keep, chunk=chunk), Scheme.ring(keep=keep, chunk=chunk)]
        for team, keys in product(range(2, ranks + 1), ("gather", "ring")):
            if ranks % team == 0:
                found.append(Scheme.two_dimensional(head_ranks=team, keys=keys, keep=keep, chunk=chunk))
    found += [replace(scheme, offload=True) for scheme in found[-2:]]
    return [*found, Scheme.ulysses(chunk=CHUNKS[0]), Scheme.ulysses(keep=False)]


def takes_attend(scheme: Scheme) -> bool:
    return scheme.keys.value == "gather" and not scheme.is_bounded


@dataclass(frozen=True, slots=True)
class SpreadCase:
    """A case, and how it is spread. ``tokens`` names its order of tokens: one of ORDERS."""

    case: Case
    scheme: Scheme
    tokens: str

    @property
    def shardings(self) -> tuple[TokenSharding, TokenSharding]:
        """Of queries, and of keys."""
        own = self._sharding(self.case.seq, self.case.seed)
        return own, self._sharding(self.case.kv_seq, self.case.seed + 1) if self.case.kind in CROSS else own

    def _sharding(self, seq: tuple[int, ...], seed: int) -> TokenSharding:
        case, length = self.case, sum(seq)
        rows: Any = {"batch": case.batch, "order": case.order}
        if self.tokens == "contiguous":
            return TokenSharding(seq=Partition(seq), **rows)
        if self.tokens == "zigzag":
            return TokenSharding.zigzag(length=length, ranks=case.ranks, **rows)
        if self.tokens == "striped":
            return TokenSharding.striped(length=length, ranks=case.ranks, stripe=3, **rows)
        draw = random.Random(seed)
        sizes, held = list[int](), [list[int]() for _ in range(case.ranks)]
        while sum(sizes) < length:
            sizes.append(min(draw.randrange(9), length - sum(sizes)))
        for piece in draw.sample(range(len(sizes)), len(sizes)):
            held[draw.randrange(case.ranks)].append(piece)
        return TokenSharding(
            seq=Partition(sizes or (0,)), held=held if sizes else [[0], *[()] * (case.ranks - 1)], **rows
        )

    @property
    def heads(self) -> Partition | None:
        """Every other case has heads that are cut anywhere."""
        num, draw = self.case.num_heads[0], random.Random(self.case.seed)
        marks = sorted(draw.randint(0, num) for _ in range(self.scheme.team_size(self.case.ranks) - 1))
        if self.case.seed % 2:
            return None
        return Partition(end - start for start, end in zip([0, *marks], [*marks, num], strict=True))


def sampled(cases: Sequence[Case]) -> Iterator[SpreadCase]:
    """Each case in one scheme and one order, so that together they are in all."""
    for i, case in enumerate(cases):
        choices = schemes(case.ranks)
        yield SpreadCase(case, choices[i % len(choices)], ORDERS[(i // len(choices) + i) % len(ORDERS)])


def failures_in(ranks_of: RankThreads, ranks: int, batch: list[SpreadCase], timeout: float = 60) -> list[str]:
    results = ranks_of.run(equal_in_scheme, ranks, batch, timeout=timeout)
    return [f"rank {rank}: {failure}" for rank, failures in enumerate(results) for failure in failures]


def equal_in_scheme(rank: int, batch: list[SpreadCase]) -> list[str]:
    """What differs from the reference in float64."""
    return [
        f"{name} by {by:.1e}: {each}"
        for each in batch
        for name, by in differences(rank, each, None).items()
        if not by <= TOLERANCE
    ]


def differences(rank: int, each: SpreadCase, attend: Attend | None) -> dict[str, float]:
    """How far this rank's output and gradients, and the sums of those of options, are from the reference."""
    case, wanted = each.case, answer_of(each.case)
    whole = Whole.of(case, torch.float64)
    sharding, kv_sharding = each.shardings
    q_BlNH = leaf(cut_by_loops(whole.q_BLNH, sharding, rank))
    k_BlGH, v_BlGH = (leaf(cut_by_loops(x, kv_sharding, rank)) for x in (whole.k_BLGH, whole.v_BLGH))
    options: dict[str, Any] = dict(whole.options) | {name: leaf(whole.options[name]) for name in whole.learned}
    out_BlNH = attention_over_ranks(
        q_BlNH,
        k_BlGH,
        v_BlGH,
        sharding=sharding,
        kv_sharding=kv_sharding if case.kind in CROSS else None,
        group=world(),
        scheme=each.scheme,
        heads=each.heads,
        attend=attend,
        **options,
    )
    out_BlNH.backward(cut_by_loops(whole.grad_BLNH, sharding, rank))
    got = {"out": out_BlNH.detach(), "dq": grad_of(q_BlNH), "dk": grad_of(k_BlGH), "dv": grad_of(v_BlGH)}
    of = {"out": sharding, "dq": sharding, "dk": kv_sharding, "dv": kv_sharding}
    found = {name: difference(got[name], cut_by_loops(wanted[name], of[name], rank)) for name in got}
    for name in whole.learned:
        grad = sum_of(options[name])
        found[f"d {name}"] = difference(grad, wanted[f"d {name}"])
    return found


def sum_of(option: Tensor) -> Tensor:
    """Its gradient, summed over the ranks."""
    grad = option.new_zeros(option.shape) if option.grad is None else option.grad
    dist.all_reduce(grad)
    return grad
