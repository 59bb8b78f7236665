"""The tokens that torchtitan gives the ranks of an expert-parallel group."""

from ...layout.partition import Partition
from ...layout.sharding import TokenSharding
from .interface import ParallelDims

HEAD_TAIL = "headtail"


def even_sharding(
    parallel_dims: ParallelDims, *, batch: int, length: int, load_balancer: str | None = HEAD_TAIL
) -> TokenSharding:
    """The tokens of this rank's "ep" group, as torchtitan cuts a batch: rows over "dp_shard", each sequence evenly
    over "cp", in the order of its load balancer, and these places over "tp". For :func:`known_tokens`; make it once.

    Args:
        parallel_dims: torchtitan's, with expert parallelism and its meshes built.
        batch: rows of each data-parallel rank, ``training.local_batch_size``, or those of a microbatch.
        length: of the whole sequence, ``training.seq_len``.
        load_balancer: ``parallelism.context_parallel_load_balancer``, for "cp" above 1: "headtail" is
            ``TokenSharding.zigzag``, None the contiguous order. "ptrr" orders each batch by its own mask, so there is
            no grid of all batches. None is right for it, too, with places after the permutation: every token finds
            its experts, and only the order in which an expert adds up its rows is another.

    Raises:
        ValueError: no expert parallelism, a length that does not split evenly, or another load balancer.
    """
    if parallel_dims.ep < 2:
        raise ValueError(
            f"ep is {parallel_dims.ep}, so no rows travel and no sharding is needed; leave known_tokens out"
        )
    rows, tp = parallel_dims.dp_shard, parallel_dims.tp
    places = _over_cp(length, parallel_dims.cp, tp, load_balancer).cut(tp)
    whole = places.with_batch(Partition.even(batch * rows, rows))
    first = parallel_dims.get_mesh("efsdp").get_local_rank() * parallel_dims.ep
    return whole.select(range(first, first + parallel_dims.ep))


def _over_cp(length: int, cp: int, tp: int, load_balancer: str | None) -> TokenSharding:
    """One row over "cp"."""
    if cp > 1 and load_balancer not in (HEAD_TAIL, None):
        raise ValueError(
            f"load_balancer is {load_balancer!r}; only {HEAD_TAIL!r} gives every batch the same order of tokens: "
            "pass that or None, in whose grid every token finds its experts, too"
        )
    is_zigzag = cp > 1 and load_balancer == HEAD_TAIL
    parts = 2 * cp if is_zigzag else cp
    if any(len(set(Partition.balanced(length, count).sizes)) > 1 for count in (parts, cp * tp)):
        raise ValueError(
            f"length is {length}, with cp = {cp} and tp = {tp}; torchtitan cuts it evenly, so it has to be a "
            f"multiple of cp * tp = {cp * tp}" + (f", and for {HEAD_TAIL!r} of 2 * cp = {parts}" if is_zigzag else "")
        )
    if is_zigzag:
        return TokenSharding.zigzag(batch=1, length=length, ranks=cp)
    return TokenSharding(batch=1, seq=Partition.even(length, cp))
