"""The experts of every token of a Transformers model, recorded and replayed: records are those of moe_dispatch."""

from .contexts import record_routing, replay_routing

__all__ = ["record_routing", "replay_routing"]
