"""The experts of the tokens of one forward of one layer, by global token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout.sharding import TokenSharding
from ..plan.ids.format import MOST_EXPERTS

ID_DTYPE = torch.int16  # holds every id, see MOST_EXPERTS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choices:
    """The K experts of N tokens of one forward: of all tokens, or of those that a rank holds.

    Attributes:
        grid: (B, L), rows and positions of the whole batch.
        num_experts: E, of all ranks.
        token_N: (N,) int64 on the CPU, ascending: ``row * L + position``, in either order of the tensors.
        expert_NK: (N, K) int16 on the CPU: ids, -1 for no expert.

    Raises:
        ValueError: tokens that the grid does not have or that are there twice, ids that are no experts, other dtypes.
    """

    grid: tuple[int, int]
    num_experts: int
    token_N: Tensor
    expert_NK: Tensor

    def __post_init__(self) -> None:
        token_N, expert_NK, (rows, length) = self.token_N, self.expert_NK, self.grid
        if not 1 <= self.num_experts <= MOST_EXPERTS:
            raise ValueError(f"{self.num_experts} experts; a layer can have 1 to {MOST_EXPERTS}")
        shapes = f"tokens {tuple(token_N.shape)} and experts {tuple(expert_NK.shape)}"
        if token_N.ndim != 1 or expert_NK.ndim != 2 or len(token_N) != len(expert_NK):
            raise ValueError(f"{shapes}; they have to be (N,) and (N, K)")
        if (token_N.dtype, expert_NK.dtype) != (torch.int64, ID_DTYPE):
            raise ValueError(f"tokens of {token_N.dtype} and experts of {expert_NK.dtype}; use int64 and {ID_DTYPE}")
        if not len(token_N):
            return
        if token_N[0] < 0 or token_N[-1] >= rows * length or (token_N[1:] <= token_N[:-1]).any():
            raise ValueError(
                f"tokens {int(token_N.min())} to {int(token_N.max())} of a grid of {rows} x {length}; they have to "
                f"be 0 to {rows * length - 1}, ascending, each once"
            )
        if expert_NK.numel() and (expert_NK.min() < -1 or expert_NK.max() >= self.num_experts):
            raise ValueError(
                f"expert ids {int(expert_NK.min())} to {int(expert_NK.max())}; ids are 0 to {self.num_experts - 1}, "
                "or -1 for no expert"
            )

    @classmethod
    def of_all(cls, expert_BLK: Tensor, num_experts: int) -> "Choices":
        """From (B, L, K) ids of every token."""
        if expert_BLK.ndim != 3 or expert_BLK.is_floating_point():
            raise ValueError(
                f"experts of shape {tuple(expert_BLK.shape)} of {expert_BLK.dtype}; the experts of all tokens of a "
                "forward are ints of shape (B, L, K)"
            )
        rows, length, _ = expert_BLK.shape
        expert_NK = expert_BLK.detach().cpu().flatten(0, 1)
        # Before they are narrowed: 65536 would be 0.
        checked_NK = expert_NK.clamp(-2, MOST_EXPERTS).to(ID_DTYPE)
        token_N = torch.arange(rows * length, device="cpu")
        return cls(grid=(rows, length), num_experts=num_experts, token_N=token_N, expert_NK=checked_NK)

    @property
    def is_whole(self) -> bool:
        """Whether every token of the grid is there."""
        return len(self.token_N) == self.grid[0] * self.grid[1]

    @property
    def is_partial(self) -> bool:
        """Whether a token goes to some experts, but to fewer than K."""
        none_NK = self.expert_NK < 0
        return bool((none_NK.any(1) & ~none_NK.all(1)).any())

    @property
    def facts(self) -> str:
        """What parts of one forward have in common."""
        return f"{self.grid[0]} x {self.grid[1]} tokens, K = {self.expert_NK.shape[1]} of {self.num_experts} experts"

    def at(self, token_t: Tensor) -> tuple[Tensor, int]:
        """(t, K) experts of these tokens, and how many of the tokens are not there."""
        if not len(self.token_N):
            return self.expert_NK.new_full((len(token_t), self.expert_NK.shape[1]), -1), len(token_t)
        place_t = torch.searchsorted(self.token_N, token_t).clamp(max=len(self.token_N) - 1)
        return self.expert_NK[place_t], int((self.token_N[place_t] != token_t).sum())


def together(parts: Sequence[Choices]) -> Choices:
    """One of all parts of a forward, which have the same facts. Tokens may be in several, with the same experts.

    Raises:
        ValueError: with other experts.
    """
    token_N, order_N = torch.sort(torch.cat([part.token_N for part in parts]), stable=True)
    expert_NK = torch.cat([part.expert_NK for part in parts])[order_N]
    again_n = token_N[1:] == token_N[:-1]
    differs_n = again_n & (expert_NK[1:] != expert_NK[:-1]).any(1)
    if differs_n.any():
        place = int(differs_n.to(torch.int8).argmax())
        raise ValueError(
            f"token {int(token_N[place])} has experts {expert_NK[place].tolist()} and, elsewhere, "
            f"{expert_NK[place + 1].tolist()}"
        )
    first_N = torch.cat([again_n.new_zeros(len(token_N[:1])), again_n]).logical_not()
    first = parts[0]
    return Choices(
        grid=first.grid, num_experts=first.num_experts, token_N=token_N[first_N], expert_NK=expert_NK[first_N]
    )


# ---- the tensors of a rank -------------------------------------------------------------------------------


def tokens_of(sharding: TokenSharding, rank: int) -> Tensor:
    """(t,) ``row * L + position`` of each of the rank's tokens, row after row, and of each row in the order of the
    rank's tensor; on the CPU, kept by the sharding."""
    return sharding.keep(
        (Choices, rank),
        lambda: (
            TokenSharding(batch=sharding.batch, seq=sharding.seq, held=sharding.held)
            .select(sharding.rectangles)
            .tokens(rank, "cpu")
        ),
    )


def ascending(sharding: TokenSharding, rank: int) -> tuple[Tensor, Tensor]:
    """(t,) :func:`tokens_of` in ascending order, and (t,) where each of them is among those; kept by the sharding."""
    return sharding.keep((Choices, rank, "ascending"), lambda: tokens_of(sharding, rank).sort())


def flattened(expert_BlK: Tensor, sharding: TokenSharding) -> Tensor:
    """(b, l, K), or (l, b, K), of a rank -> (t, K) in the order of :func:`tokens_of`."""
    return (expert_BlK if sharding.order == "BL" else expert_BlK.transpose(0, 1)).flatten(0, 1)


def shaped(expert_tK: Tensor, sharding: TokenSharding, rank: int) -> Tensor:
    """The inverse of :func:`flattened`."""
    expert_blK = expert_tK.unflatten(0, sharding.extent(rank))
    return expert_blK if sharding.order == "BL" else expert_blK.transpose(0, 1)
