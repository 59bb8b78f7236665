"""Expert-parallel dispatch and combine: exact for uneven shards, in few bytes, unable to fail silently."""

from .balance import sequence_balance_loss
from .dispatch import combine, dispatch
from .exchange import exchange_rows
from .experts import GroupedExperts, SwiGLU
from .mesh import ParallelMesh, build_mesh
from .metadata import DispatchMetadata, plan_dispatch
from .moe import MoE
from .partition import Partition
from .placement import gather_tokens, place_tokens
from .router import TopKRouter
from .sharding import TokenSharding

__all__ = [
    "DispatchMetadata",
    "GroupedExperts",
    "MoE",
    "ParallelMesh",
    "Partition",
    "SwiGLU",
    "TokenSharding",
    "TopKRouter",
    "build_mesh",
    "combine",
    "dispatch",
    "exchange_rows",
    "gather_tokens",
    "place_tokens",
    "plan_dispatch",
    "sequence_balance_loss",
]
