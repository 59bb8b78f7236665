"""Where the experts of tokens are chosen in a model, by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from ..layout.sharding import TokenSharding
from .names import without_wrappers

T = TypeVar("T")


class Watcher(Protocol):
    """Sees the experts of each forward of a layer."""

    def show(self, expert_BlK: Tensor, sharding: TokenSharding, rank: int) -> None:
        """(b, l, K), or (l, b, K), int64: those of the forward that was planned. A recomputation is none."""
        ...


class Source(Watcher, Protocol):
    """Knows the experts of each forward of a layer."""

    def next(self, sharding: TokenSharding, rank: int) -> Tensor:
        """(b, l, K), or (l, b, K), int64 on the CPU: those of the next forward, the same until one was shown.
        ValueError with what is wrong on this rank."""
        ...


@dataclass(slots=True, eq=False)
class Tap:
    """Where a layer shows the experts of its tokens, and takes those of somebody else in their place.

    A copy, or what a file brings back, has nobody at it.

    Attributes:
        watchers: who sees them.
        sources: who decides them: nobody, so that the layer does, or one.
    """

    watchers: list[Watcher] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Tap, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        return Tap()

    @property
    def is_used(self) -> bool:
        return bool(self.watchers or self.sources)

    def show(self, expert_BlK: Tensor, sharding: TokenSharding, rank: int) -> None:
        """Tell all of them the experts of a forward."""
        for watcher in (*self.sources, *self.watchers):
            watcher.show(expert_BlK, sharding, rank)


@contextmanager
def at_tap(place: list[T], one: T) -> Iterator[None]:
    """``one`` is among the watchers or sources of a tap. Contexts may end in any order."""
    place.append(one)
    try:
        yield
    finally:
        place.remove(one)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A layer as records know it.

    Attributes:
        tap: of the layer.
        num_experts: E, of all ranks.
        num_choices: K.
        groups: the ranks that run the layer together; no group for a layer of one process.
        all_or_none: whether a token has to go to K experts, or to none.
    """

    tap: Tap
    num_experts: int
    num_choices: int
    groups: tuple[dist.ProcessGroup, ...]
    all_or_none: bool = False


def sites_of(model: nn.Module) -> dict[str, Site]:
    """The site of each module whose class has a method ``routing_site``, by the module's name without what wrappers
    put into it: DistributedDataParallel, FSDP, torch.compile, checkpoint_wrapper.

    Raises:
        ValueError: there is none.
    """
    modules, sites = dict(model.named_modules()), dict[str, Site]()
    for name, module in modules.items():
        # Asked of the class: FSDP1 and torch.compile give the attributes of what they wrap.
        make_site = getattr(type(module), "routing_site", None)
        if make_site is not None:
            sites[without_wrappers(name, modules)] = make_site(module)
    if not sites:
        raise ValueError(
            f"no layer of this {type(model).__name__} chooses experts; pass the model that holds the MoE layers (a "
            "stage of a pipeline without any needs no record). Models of Transformers have functions of the same "
            "names, in moe_dispatch.integrations.transformers"
        )
    return sites
