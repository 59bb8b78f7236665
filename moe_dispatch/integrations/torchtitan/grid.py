"""The tokens that torchtitan gives the ranks of an expert-parallel group."""

from ...layout.partition import Partition
from ...layout.sharding import TokenSharding
from .interface import ParallelDims


def even_sharding(parallel_dims: ParallelDims, *, batch: int, length: int) -> TokenSharding:
    """The tokens of this rank's "ep" group, as torchtitan cuts a batch: rows over "dp_shard", each sequence evenly
    over "cp", and these pieces over "tp". For :func:`known_tokens`; make it once.

    Where torchtitan's load balancer of context parallelism permutes sequences, positions of the grid are places after
    that. Every token still finds its experts; only the order in which an expert adds up its rows is another.

    Args:
        parallel_dims: torchtitan's, with expert parallelism and its meshes built.
        batch: rows of each data-parallel rank, ``training.local_batch_size``, or those of a microbatch.
        length: of the whole sequence, ``training.seq_len``.

    Raises:
        ValueError: no expert parallelism, or a length that does not split evenly.
    """
    if parallel_dims.ep < 2:
        raise ValueError(
            f"ep is {parallel_dims.ep}, so no rows travel and no sharding is needed; leave known_tokens out"
        )
    rows, pieces = parallel_dims.dp_shard, parallel_dims.cp * parallel_dims.tp
    whole = TokenSharding(batch=Partition.even(batch * rows, rows), seq=Partition.even(length, pieces))
    first = parallel_dims.get_mesh("efsdp").get_local_rank() * parallel_dims.ep
    return whole.select(range(first, first + parallel_dims.ep))
