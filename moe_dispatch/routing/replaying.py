"""Routing of a record in the place of what layers would choose."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..errors import GroupError
from ..layout.sharding import TokenSharding
from ..wire.agreement import agree
from ..wire.devices import device_of
from .choices import Choices, shaped, tokens_of
from .record import RoutingRecord
from .sites import Site, at_tap, sites_of


@contextmanager
def replay_routing(model: nn.Module, record: RoutingRecord) -> Iterator[None]:
    """Send the tokens of each :class:`MoE` of ``model`` to the experts of ``record``, whatever the layout, the
    planner and today's weights: the n-th forward of a layer in this context takes the n-th of the record.

    Weights of the experts are the router's scores of them, so gradients pass through the scores as they are now, also
    of an expert that is not among today's K best. Recomputations take the experts of their forward, inside of the
    context or after it. Loads are counted as always. Padding (``real_Bl``) goes nowhere, whatever the record has for
    it; a token that is padding in the record goes nowhere either.

    A rank needs its own tokens in the record: all of them (:meth:`RoutingRecord.gather`), or those that it recorded
    in the same layout. At the start the ranks of each layer's group compare layers and forwards: one exchange of 8
    bytes per pair of ranks.

    Raises:
        GroupError: on every rank of a layer's group. At the start: a record of other layers, of another number of
            experts or of choices per token, or another record on another rank. In a forward, before any row moves:
            another number of rows or positions, tokens that the record does not have, more forwards than it has, or
            ``expert_BlK`` given to the layer as well.
        ValueError: when the context ends without an exception, on every rank: forwards are left over.
    """
    with replaying(sites_of(model), record):
        yield


@contextmanager
def replaying(sites: Mapping[str, Site], record: RoutingRecord) -> Iterator[None]:
    """:func:`replay_routing` into layers of any kind."""
    _compare(sites, record)
    replays = {name: Replay(name, record.layers[name]) for name in sites}
    with ExitStack() as stack:
        for name, site in sites.items():
            stack.enter_context(at_tap(site.tap.sources, replays[name]))
        yield
    # Every rank of a group ran as many forwards, and has a record of as many: all see it by themselves.
    if left := [name for name, replay in replays.items() if replay.is_left]:
        raise ValueError(
            f"{replays[left[0]].told}, of which {replays[left[0]].taken} were replayed when the context ended, and "
            f"{len(left)} of {len(replays)} layers have forwards left; run the forwards that were recorded"
        )


class Replay:
    """Decides for one layer."""

    def __init__(self, name: str, forwards: Sequence[Choices]) -> None:
        self._name, self._forwards, self.taken = name, forwards, 0

    @property
    def told(self) -> str:
        count = len(self._forwards)
        return f"the record has {count} forward{'s' * (count != 1)} of {self._name or 'this layer'}"

    @property
    def is_left(self) -> bool:
        return self.taken < len(self._forwards)

    def next(self, sharding: TokenSharding, rank: int) -> Tensor:
        if not self.is_left:
            raise ValueError(f"{self.told}, and this is one more; record as many as are replayed")
        forward, grid = self._forwards[self.taken], (sharding.batch.total, sharding.seq.total)
        where = f"forward {self.taken} of {self._name or 'this layer'}"
        if forward.grid != grid:
            raise ValueError(
                f"{where} was recorded for {forward.grid[0]} x {forward.grid[1]} tokens, and has {grid[0]} x "
                f"{grid[1]} now; replay the batch that was recorded"
            )
        token_t = tokens_of(sharding, rank)
        expert_tK, missing = forward.at(token_t)
        if missing:
            raise ValueError(
                f"the record lacks {missing} of the {len(token_t)} tokens of this rank in {where}; put together what "
                "all ranks recorded, by record.gather(group)"
            )
        return shaped(expert_tK.to(torch.int64), sharding, rank)

    def show(self, expert_BlK: Tensor, sharding: TokenSharding, rank: int) -> None:
        """Only now, so that a forward that a rank refused is taken by none."""
        self.taken += 1


def _compare(sites: Mapping[str, Site], record: RoutingRecord) -> None:
    """Raise on every rank of each group unless the record fits its layers, and all have the same."""
    problem, errors = _problem(sites, record), list[GroupError]()
    groups = dict.fromkeys(group for site in sites.values() for group in site.groups)
    if problem and not groups:
        raise ValueError(problem)
    for group in groups:
        mine = [name for name, site in sites.items() if group in site.groups]
        layers = {} if problem else {name: record.layers[name] for name in mine}
        facts = "; ".join(f"{name}: {[x.facts for x in forwards]}" for name, forwards in layers.items())
        try:
            agree(facts, device=device_of(group), group=group, problem=problem)
        except GroupError as error:  # ranks of the other groups wait for this one
            errors.append(error)
    if errors:
        raise errors[0]


def _problem(sites: Mapping[str, Site], record: RoutingRecord) -> str:
    if not isinstance(record, RoutingRecord):
        return f"the record is a {type(record).__name__}; pass a RoutingRecord, e.g. RoutingRecord.load(path)"
    missing, others = sites.keys() - record.layers.keys(), record.layers.keys() - sites.keys()
    if missing:
        return f"the record has no layers {sorted(missing)}, which the model has; it has {sorted(record.layers)}"
    if others:
        return (
            f"the record has layers {sorted(others)}, and the model does not; for a stage of a pipeline take "
            "record.restrict_to(stage)"
        )
    for name, site in sites.items():
        if site.tap.sources:
            return f"{name or 'this layer'} replays a record already; end that context first"
        for x in record.layers[name]:
            if (x.num_experts, x.expert_NK.shape[1]) != (site.num_experts, site.num_choices):
                return (
                    f"{name or 'this layer'} was recorded with K = {x.expert_NK.shape[1]} of {x.num_experts} "
                    f"experts, and has K = {site.num_choices} of {site.num_experts}; replay the model that was "
                    "recorded"
                )
            if site.all_or_none and x.is_partial:
                return (
                    f"{name or 'this layer'} was recorded with tokens that go to fewer than K experts (-1 beside "
                    "ids), for which its router has no weights; a token of such a layer goes to K experts, or to none"
                )
    return ""
