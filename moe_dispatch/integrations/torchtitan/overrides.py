"""Overrides of torchtitan's configs, each named by its path in ``--override.imports``."""

from .dispatcher import MoEDispatchTokenDispatcher
from .interface import AllToAllTokenDispatcher, derive, override


@override(
    target=AllToAllTokenDispatcher.Config,
    exact=True,  # its subclass pads rows for quantized experts, which ours does not
    description="Rows travel by moe_dispatch: once per rank, any numbers of tokens.",
)
def token_dispatcher(config: AllToAllTokenDispatcher.Config) -> MoEDispatchTokenDispatcher.Config:
    """torchtitan's standard dispatcher, in every layer that has it, becomes :class:`MoEDispatchTokenDispatcher`."""
    return derive(config, MoEDispatchTokenDispatcher.Config)
