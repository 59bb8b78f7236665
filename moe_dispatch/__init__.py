"""Expert-parallel dispatch and combine: exact for uneven shards, in few bytes, unable to fail silently."""

from .agreement import BAD, agree, digest, raise_on_every_rank
from .balance import sequence_balance_loss
from .dispatch import PendingCombine, PendingDispatch, combine, dispatch, start_combine, start_dispatch
from .exchange import check_group, exchange_rows, start_exchange
from .experts import GroupedExperts, SwiGLU
from .hierarchy import combine_hierarchical, dispatch_hierarchical
from .hierarchy_plan import HierarchicalPlan, NodeGroups, plan_hierarchical
from .mesh import ParallelMesh, build_mesh
from .metadata import DispatchMetadata, plan_dispatch
from .moe import MoE
from .partition import Partition
from .placement import gather_tokens, place_tokens
from .router import TopKRouter
from .sharding import TokenSharding
from .static_index import StaticSizes
from .static_plan import StaticPlan, plan_static

__all__ = [
    "BAD",
    "DispatchMetadata",
    "GroupedExperts",
    "HierarchicalPlan",
    "MoE",
    "NodeGroups",
    "ParallelMesh",
    "Partition",
    "PendingCombine",
    "PendingDispatch",
    "StaticPlan",
    "StaticSizes",
    "SwiGLU",
    "TokenSharding",
    "TopKRouter",
    "agree",
    "build_mesh",
    "check_group",
    "combine",
    "combine_hierarchical",
    "digest",
    "dispatch",
    "dispatch_hierarchical",
    "exchange_rows",
    "gather_tokens",
    "place_tokens",
    "plan_dispatch",
    "plan_hierarchical",
    "plan_static",
    "raise_on_every_rank",
    "sequence_balance_loss",
    "start_combine",
    "start_dispatch",
    "start_exchange",
]
