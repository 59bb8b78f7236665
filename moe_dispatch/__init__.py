"""Expert-parallel dispatch and combine: exact for uneven shards, in few bytes, unable to fail silently."""

from .errors import DisagreementError, GroupError, RankMistakeError, StaticSizesError
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
from .wire.agreement import agree
from .wire.exchange import exchange_rows
from .wire.regions import gather_tokens, place_tokens

__all__ = [
    "DisagreementError",
    "DispatchMetadata",
    "GroupError",
    "GroupedExperts",
    "HierarchicalPlan",
    "MoE",
    "NodeGroups",
    "ParallelMesh",
    "Partition",
    "PendingCombine",
    "PendingDispatch",
    "RankMistakeError",
    "StaticPlan",
    "StaticSizes",
    "StaticSizesError",
    "SwiGLU",
    "TokenSharding",
    "TopKRouter",
    "agree",
    "build_mesh",
    "combine",
    "combine_hierarchical",
    "dispatch",
    "dispatch_hierarchical",
    "exchange_rows",
    "gather_tokens",
    "place_tokens",
    "plan_dispatch",
    "plan_hierarchical",
    "plan_static",
    "sequence_balance_loss",
    "start_combine",
    "start_dispatch",
]
