"""The schemes that a group can have, and other orders of the same tokens."""

from moe_dispatch import Partition, TokenSharding

from ..batch.balance import balanced_runs
from ..work.scheme import NO_BOUND, Scheme


def schemes(ranks: int, *, chunk: int = NO_BOUND, own_attend: bool = False) -> list[Scheme]:
    """Ulysses; for every number of head ranks below that of the ranks, keys gathered again in backward, kept, or in
    turns. An ``attend`` of the caller's takes no turns, and keeps what it got."""
    found = [Scheme.ulysses(chunk=chunk)]
    for head_ranks in range(1, ranks):
        if ranks % head_ranks:
            continue
        found.append(Scheme.two_dimensional(head_ranks=head_ranks, keep=True, chunk=chunk))
        if not own_attend:
            found.append(Scheme.two_dimensional(head_ranks=head_ranks, chunk=chunk))
            found.append(Scheme.two_dimensional(head_ranks=head_ranks, keys="ring", chunk=chunk))
    return found


def name_of(scheme: Scheme, ranks: int) -> str:
    """As short as in tables."""
    size, kept = scheme.team_size(ranks), ", kept" if scheme.keep else ""
    if size == ranks:
        return "ulysses"
    keys = f"{scheme.keys.value}{kept}"
    return keys if size == 1 else f"{size} head ranks, {keys}"


def other_orders(sharding: TokenSharding, spans: tuple[tuple[int, int], ...]) -> dict[str, TokenSharding]:
    """The same tokens on as many ranks: contiguous, zigzag, and of documents as :func:`balance` has them.

    Args:
        spans: of each document; one of the whole sequence where there are none.
    """
    batch, length, ranks = sharding.batch.total, sharding.seq.total, sharding.num_ranks
    order = sharding.order
    found = {
        "contiguous": TokenSharding(batch=batch, seq=Partition.balanced(length, ranks), order=order),
        "zigzag": TokenSharding.zigzag(batch=batch, length=length, ranks=ranks, order=order),
    }
    if spans != ((0, length),):
        runs = balanced_runs(spans, length, ranks)
        found["balance"] = TokenSharding.of_runs(batch=batch, length=length, runs=runs, order=order)
    return {name: other for name, other in found.items() if other != sharding}
