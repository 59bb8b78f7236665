"""Experts of Transformers' MoE models over ranks.

Transformers gives each experts module the rows of all tokens, flat, their expert ids and their weights, and lets a
registered function compute. Ours sends rows to the ranks of their experts; each rank keeps its share of the weights.
"""

from .apply import apply_expert_parallel
from .aux_loss import global_aux_loss
from .implementation import follow_steps as follow_steps  # for sp_attention, whose steps come by
from .implementation import problem_of_mesh as problem_of_mesh
from .implementation import register_implementation
from .routing import record_routing, replay_routing

__all__ = [
    "apply_expert_parallel",
    "global_aux_loss",
    "record_routing",
    "register_implementation",
    "replay_routing",
]
