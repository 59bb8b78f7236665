"""Expert-parallel dispatch and combine: exact for uneven shards, in few bytes, unable to fail silently."""

from .errors import DisagreementError, GroupError, RankMistakeError, StaticSizesError
from .layer.balance import sequence_balance_loss
from .layer.data_parallel import leave_experts_to_ranks
from .layer.experts import GroupedExperts, SwiGLU
from .layer.moe import MoE
from .layer.router import TopKRouter
from .layout.mesh import ParallelMesh, build_mesh
from .layout.partition import Partition
from .layout.sharding import TokenSharding
from .plan.counted import Counted, plan_dispatch
from .plan.hierarchical import HierarchicalPlan, NodeGroups, plan_hierarchical
from .plan.metadata import DispatchMetadata
from .plan.static import StaticPlan, StaticSizes, plan_static
from .routing.record import RoutingRecord
from .routing.recording import record_routing
from .routing.replaying import replay_routing
from .rows.combine import combine, start_combine
from .rows.dispatch import dispatch, start_dispatch
from .training.clip import clip_grad_norm
from .training.gradients import sum_gradients
from .training.replicas import check_replicated
from .training.split_experts import split_experts
from .training.whole_state import share_of_state_dict, whole_state_dict
from .wire.agreement import agree
from .wire.exchange import exchange_rows
from .wire.regions import gather_tokens, place_tokens
from .wire.token_counts import gather_sharding

__all__ = [
    "Counted",
    "DisagreementError",
    "DispatchMetadata",
    "GroupError",
    "GroupedExperts",
    "HierarchicalPlan",
    "MoE",
    "NodeGroups",
    "ParallelMesh",
    "Partition",
    "RankMistakeError",
    "RoutingRecord",
    "StaticPlan",
    "StaticSizes",
    "StaticSizesError",
    "SwiGLU",
    "TokenSharding",
    "TopKRouter",
    "agree",
    "build_mesh",
    "check_replicated",
    "clip_grad_norm",
    "combine",
    "dispatch",
    "exchange_rows",
    "gather_sharding",
    "gather_tokens",
    "leave_experts_to_ranks",
    "place_tokens",
    "plan_dispatch",
    "plan_hierarchical",
    "plan_static",
    "record_routing",
    "replay_routing",
    "sequence_balance_loss",
    "share_of_state_dict",
    "split_experts",
    "start_combine",
    "start_dispatch",
    "sum_gradients",
    "whole_state_dict",
]
