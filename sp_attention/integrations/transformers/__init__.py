"""Transformers' models over sequence-parallel, data-parallel and expert-parallel ranks.

A batch is cut once (:func:`shard_batch`). What attention and experts need to know of it, the step, travels as a
keyword of ``model(...)`` to every layer. So nothing is kept on the model between two calls.
"""

from .apply import apply_sequence_parallel
from .loss import causal_lm_loss
from .parallel import Parallel
from .step import Step, gather_sequence, shard_batch

__all__ = ["Parallel", "Step", "apply_sequence_parallel", "causal_lm_loss", "gather_sequence", "shard_batch"]
