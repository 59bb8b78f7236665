"""Expert-parallel dispatch and combine: exact for uneven shards, in few bytes, unable to fail silently."""

from .layer.balance import sequence_balance_loss
from .layer.experts import GroupedExperts, SwiGLU
from .layer.moe import MoE
from .layer.router import TopKRouter
from .layout.mesh import ParallelMesh, build_mesh
from .layout.partition import Partition
from .layout.sharding import TokenSharding
from .plan.counted import DispatchMetadata, plan_dispatch
from .plan.hierarchical import HierarchicalPlan, NodeGroups, plan_hierarchical
from .plan.static import StaticPlan, plan_static
from .plan.static_index import StaticSizes
from .rows.dispatch import PendingCombine, PendingDispatch, combine, dispatch, start_combine, start_dispatch
from .rows.hierarchical import combine_hierarchical, dispatch_hierarchical
from .wire.agreement import BAD, agree, digest, raise_on_every_rank
from .wire.exchange import check_group, exchange_rows, start_exchange
from .wire.regions import gather_tokens, place_tokens

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
