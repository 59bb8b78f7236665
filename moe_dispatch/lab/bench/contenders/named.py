"""The contenders of a workload by name: ours, the textbook's, torch's own, and a class of the user's."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from sp_attention import Scheme

from .ours import OurDispatch, OurDispatchWeighedByExperts, OurUlysses
from .protocol import Contender, Made
from .schemes import OurAttention
from .textbook import TextbookAttention, TextbookDispatch, TextbookUlysses
from .torch_ring import TorchRing

KINDS = ("dispatch", "ulysses", "attention")
Make = Callable[[Any, dist.ProcessGroup], Made]  # of a workload


def contenders_of(kind: str, adapter: str) -> dict[str, Make]:
    """Name -> what makes it, of those that do workloads of this kind, ours first; ``adapter`` may be empty."""
    of_kind: dict[str, dict[str, Make]] = {
        "dispatch": {
            "ours": OurDispatch,
            "experts weigh": OurDispatchWeighedByExperts,
            "textbook": TextbookDispatch,
        },
        "ulysses": {"ours": OurUlysses, "textbook": TextbookUlysses},
        "attention": {
            **_in_both_orders("Ulysses", OurAttention, scheme=Scheme.ulysses()),
            **_in_both_orders("gather", OurAttention, scheme=Scheme.gather()),
            **_in_both_orders("ring", OurAttention, scheme=Scheme.ring()),
            **_in_both_orders("2-D", OurAttention, scheme=Scheme.two_dimensional(head_ranks=2)),
            "textbook": TextbookAttention,
            **_in_both_orders("torch gather", TorchRing, rotate="ALL_GATHER"),
            **_in_both_orders("torch ring", TorchRing, rotate="ALL_TO_ALL"),
        },
    }
    found = of_kind[kind]
    if adapter:
        adapted = find_adapter(adapter)
        if getattr(adapted, "kind", "dispatch") == kind:
            found[adapted.__name__ if adapted.__name__ not in found else adapter] = adapted
    return found


def _in_both_orders(name: str, make: Callable[..., Made], **how: Any) -> dict[str, Make]:
    return {name: partial(make, order="contiguous", **how), f"{name} zigzag": partial(make, order="zigzag", **how)}


def find_adapter(name: str) -> type[Contender]:
    """The class that ``package.module:Name`` names.

    Raises:
        ValueError: a name of another form, no such module or class, or one without ``forward``.
    """
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise ValueError(f"adapter {name!r} is not of the form package.module:Name, e.g. my_bench.titan:Dispatcher")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"adapter {name!r} cannot be imported ({error}); its module has to be installed, or in a folder that "
            "PYTHONPATH names"
        ) from None
    adapted = getattr(module, class_name, None)
    if not isinstance(adapted, type) or not callable(getattr(adapted, "forward", None)):
        fact = "does not exist" if adapted is None else "is no class with a method forward"
        raise ValueError(
            f"adapter {name!r}: {class_name} {fact}; see Contender in lab/bench/contenders/protocol.py for what it "
            "needs"
        )
    kind = getattr(adapted, "kind", "dispatch")
    if kind not in KINDS:
        raise ValueError(f'adapter {name!r} has kind = {kind!r}; it has to be "dispatch", "ulysses" or "attention"')
    return adapted
