"""What layers choose, as it happens."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..layout.sharding import TokenSharding
from .choices import ID_DTYPE, Choices, ascending, flattened
from .record import RoutingRecord
from .sites import Site, at_tap, sites_of


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the experts of this rank's tokens in each forward of each :class:`MoE` of ``model``, in training and in
    inference: those that the router chose, were given, or are replayed; -1 at padding. Recomputations do not count.

    It communicates nothing. Each rank records the tokens that it holds, by their place in the whole batch;
    :meth:`RoutingRecord.gather` puts them together. Names of layers are those of the model without its wrappers
    (DistributedDataParallel, FSDP, torch.compile, checkpoint_wrapper).

    Yields:
        A record that is empty until the context ends, and stays so if an exception ends it.

    Raises:
        ValueError: a model without such layers.
    """
    with recording(sites_of(model)) as record:
        yield record


@contextmanager
def recording(sites: Mapping[str, Site]) -> Iterator[RoutingRecord]:
    """:func:`record_routing` of layers of any kind."""
    record = RoutingRecord({})
    recordings = {name: Recording(site.num_experts) for name, site in sites.items()}
    with ExitStack() as stack:
        for name, site in sites.items():
            stack.enter_context(at_tap(site.tap.watchers, recordings[name]))
        yield record
    record._layers = {name: one.choices() for name, one in recordings.items()}


class Recording:
    """Watches one layer. Ids stay on their device until the end: the layer does not wait for it."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._seen: list[tuple[TokenSharding, int, Tensor]] = []

    def show(self, expert_BlK: Tensor, sharding: TokenSharding, rank: int) -> None:
        # A copy always: int64 ids become int16.
        self._seen.append((sharding, rank, flattened(expert_BlK.detach(), sharding).to(ID_DTYPE)))

    def choices(self) -> tuple[Choices, ...]:
        return tuple(self._choices_of(*seen) for seen in self._seen)

    def _choices_of(self, sharding: TokenSharding, rank: int, expert_tK: Tensor) -> Choices:
        token_N, local_N = ascending(sharding, rank)
        return Choices(
            grid=(sharding.batch.total, sharding.seq.total),
            num_experts=self._num_experts,
            token_N=token_N,
            expert_NK=expert_tK.cpu()[local_N],
        )
