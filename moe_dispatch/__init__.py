"""Expert-parallel dispatch and combine: exact for uneven shards, in few bytes, unable to fail silently."""

from .agreement import BAD, agree, digest, raise_on_every_rank
from .balance import sequence_balance_loss
from .dispatch import PendingCombine, PendingDispatch, combine, dispatch, start_combine, start_dispatch
from .exchange import check_group, exchange_rows, move_rows
from .experts import GroupedExperts, SwiGLU
from .mesh import ParallelMesh, build_mesh
from .metadata import DispatchMetadata, plan_dispatch
from .moe import MoE
from .partition import Partition
from .placement import gather_tokens, place_tokens
from .router import TopKRouter
from .sharding import TokenSharding

__all__ = [
    "BAD",
    "DispatchMetadata",
    "GroupedExperts",
    "MoE",
    "ParallelMesh",
    "Partition",
    "PendingCombine",
    "PendingDispatch",
    "SwiGLU",
    "TokenSharding",
    "TopKRouter",
    "agree",
    "build_mesh",
    "check_group",
    "combine",
    "digest",
    "dispatch",
    "exchange_rows",
    "gather_tokens",
    "move_rows",
    "place_tokens",
    "plan_dispatch",
    "raise_on_every_rank",
    "sequence_balance_loss",
    "start_combine",
    "start_dispatch",
]
