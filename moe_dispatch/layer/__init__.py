"""The MoE layer and its parts: router, experts, balance loss, and plans kept for recomputation."""
