"""The contenders of a workload by name: ours, the textbook's, and a class of the user's."""

import importlib

from .ours import OurDispatch, OurDispatchWeighedByExperts, OurUlysses
from .protocol import Contender
from .textbook import TextbookDispatch, TextbookUlysses


def contenders_of(kind: str, adapter: str) -> dict[str, type[Contender]]:
    """Name -> class of those that do workloads of this kind, ours first; ``adapter`` may be empty."""
    of_dispatch: dict[str, type[Contender]] = {
        "ours": OurDispatch,
        "experts weigh": OurDispatchWeighedByExperts,
        "textbook": TextbookDispatch,
    }
    of_ulysses: dict[str, type[Contender]] = {"ours": OurUlysses, "textbook": TextbookUlysses}
    found = of_dispatch if kind == "dispatch" else of_ulysses
    if adapter:
        adapted = find_adapter(adapter)
        if getattr(adapted, "kind", "dispatch") == kind:
            found[adapted.__name__ if adapted.__name__ not in found else adapter] = adapted
    return found


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
    if kind not in ("dispatch", "ulysses"):
        raise ValueError(f'adapter {name!r} has kind = {kind!r}; it has to be "dispatch" or "ulysses"')
    return adapted
