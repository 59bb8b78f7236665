"""What we use of torchtitan, or an ImportError that names the versions that have it."""

import inspect

import torchtitan

WORKS = "0.3 up to, but not including, 0.4"
SLOT = ("x_TD", "topk_scores_TK", "topk_expert_ids_TK", "num_local_tokens_per_expert_E")


def _refusal() -> ImportError:
    return ImportError(
        f"torchtitan {torchtitan.__version__} has no slot for token dispatchers that moe_dispatch knows; versions "
        f'{WORKS}, work: pip install "torchtitan>=0.3,<0.4"'
    )


try:
    import spmd_types
    from torchtitan.config import derive, override
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.models.common.token_dispatcher import (
        AllToAllTokenDispatcher,
        BaseEPTokenDispatcher,
        LocalTokenDispatcher,
    )
except ImportError as error:
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("torchtitan"):
        raise  # torchtitan itself lacks something, e.g. triton
    raise _refusal() from error

if tuple(inspect.signature(BaseEPTokenDispatcher.dispatch).parameters)[1:] != SLOT:
    raise _refusal()

__all__ = [
    "AllToAllTokenDispatcher",
    "BaseEPTokenDispatcher",
    "LocalTokenDispatcher",
    "ParallelDims",
    "derive",
    "override",
    "spmd_types",
]
