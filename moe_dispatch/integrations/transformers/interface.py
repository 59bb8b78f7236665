"""What we use of Transformers for experts, or an ImportError that names the versions that have it."""

import transformers

WORKS = "5.23 up to, but not including, 6"

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
except ImportError as error:
    raise ImportError(
        f"transformers {transformers.__version__} has no interface for experts that moe_dispatch knows; versions "
        f'{WORKS}, work: pip install "transformers>=5.23,<6"'
    ) from error

__all__ = ["ALL_EXPERTS_FUNCTIONS", "EPImplementation", "EPImplementationInterface", "use_experts_implementation"]
