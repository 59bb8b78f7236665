"""One call of a layer: which tokens come, and which experts they are given."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ....layer.recompute import in_backward
from ....layout.sharding import TokenSharding
from ....routing.sites import Tap
from ..tokens import FedTokens


class Replayed:
    """The experts of one forward, (T, K), -1 for none. A recomputation takes the same."""

    __slots__ = ("__weakref__", "expert_TK")

    def __init__(self, expert_TK: Tensor) -> None:
        self.expert_TK = expert_TK


@dataclass(slots=True, eq=False)
class Call:
    """A block that runs, up to the call of its experts.

    Attributes:
        grid: (B, L) of what the block got; empty where it is not known.
        replays: whether the experts are those of a record.
        router: the module that chose.
        replayed: what it was given.
        given_TK: the tensor that it got: an id for no expert, too.
        tokens: where somebody asked.
        problem: what is wrong on this rank.
    """

    grid: tuple[int, ...]
    replays: bool
    router: nn.Module | None = None
    replayed: Replayed | None = None
    given_TK: Tensor | None = None
    tokens: FedTokens | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """What an experts module is called with.

    Attributes:
        expert_TK: ids, -1 for no expert.
        weight_TK: 0 for no expert.
        tokens: where somebody asked for them.
        problem: what is wrong on this rank; experts do not compute then.
        tap: who wants to see it.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    tokens: FedTokens | None = None
    problem: str = ""
    tap: Tap = field(default_factory=Tap)

    @property
    def is_seen(self) -> bool:
        """A recomputation is no forward."""
        return self.tap.is_used and not in_backward()

    def show(self, tokens: FedTokens | None) -> None:
        """Once it is sure that this forward is taken."""
        if tokens is not None and self.is_seen:
            self.tap.show(tokens.own(self.expert_TK).to(torch.int64), tokens.sharding, tokens.rank)


class OwnBatch:
    """The tokens of a model that is whole on one process. Its layers share this, and with it the last sharding."""

    def __init__(self) -> None:
        self._last = FedTokens(TokenSharding(batch=0, seq=0), 0, (0, 0))

    def tokens(self, grid: tuple[int, ...], num_rows: int) -> FedTokens:
        """ValueError unless the rows are those of the grid."""
        if len(grid) != 2 or torch.Size(grid).numel() != num_rows:
            raise ValueError(
                f"experts got {num_rows} rows, and their layer tokens of shape {grid or 'unknown'}, so nothing tells "
                "which row is which token of a (B, L) batch; only layers of all tokens, (B, L, D), have a record"
            )
        if self._last.fed_shape != grid:
            self._last = FedTokens(TokenSharding(batch=grid[0], seq=grid[1]), 0, (grid[0], grid[1]))
        return self._last
