"""torchtitan on a machine without a GPU. Import this before anything of torchtitan."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"  # of a dispatcher that needs triton, imported with all


class _NoKernels(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


sys.modules.setdefault(KERNELS, _NoKernels(KERNELS))
with warnings.catch_warnings():
    # torchtitan compiles flex attention while it is imported, and that imports parts of torch that are deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    import_module("torchtitan.models.common.token_dispatcher")
