"""Routed experts of torchtitan's models over this library.

torchtitan gives the routed experts of each layer a token dispatcher; ours takes the place of its all-to-all. Experts,
their sharding, FSDP2 and checkpoints stay torchtitan's own.
"""

from .dispatcher import MoEDispatchTokenDispatcher, known_tokens
from .grid import even_sharding

__all__ = ["MoEDispatchTokenDispatcher", "even_sharding", "known_tokens"]
