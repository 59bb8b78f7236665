"""Names in a model without what wrappers put into them."""

from collections.abc import Mapping

from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Parts of a name that a wrapper puts there: FSDP1, torch.compile, checkpoint_wrapper.
OF_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


def without_wrappers(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of a module or parameter as it is in the model that was wrapped.

    Args:
        modules: ``dict(model.named_modules())``.
    """
    parts, path = list[str](), ""
    for part in name.split("."):
        of_ddp = part == "module" and isinstance(modules[path], DistributedDataParallel)
        if not of_ddp and part not in OF_WRAPPERS:
            parts.append(part)
        path = f"{path}.{part}" if path else part
    return ".".join(parts)
