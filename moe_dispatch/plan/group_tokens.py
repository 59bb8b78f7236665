"""What a plan knows before any routing has come: facts and index tensors that depend on the call only, not on ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..layout.partition import Partition
from ..layout.sharding import TokenSharding
from ..wire.agreement import digest

# A message is a word of 4 bytes and ids in steps of 4 bytes: never more than 2 K + 8 bytes for each token and rank.
WORD = torch.int32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """The tokens of a group as one rank's plan counts them: rank after rank, and this rank last (G).

    Attributes:
        order: the ranks in that order; a rank's place in it is its *place*.
        facts: what the ranks have to agree on, as text.
        expected: its digest, the status word of a rank without a problem.
        num_choices, num_experts, num_tokens: K, E, and the tokens of the whole grid.
        id_dtype: in which ids travel, plus one, 0 for "no expert".
        steps: of 4 bytes, that the ids of a token take.
        received: steps that come from each rank, the status word included.
        order_P: ``order`` on the device.
        place_of_id_E: 1 + place of each expert's rank, by id plus one; 0 for "no expert".
        mine_of_id_E: 1 + number of each expert among this rank's; 0 for all others.
        status_P: step of each rank's status word, among the steps of all messages.
        step_GS: the steps of all tokens' ids.
        token_of_G, place_of_G: global token, and the place of the rank that holds it.
        start_P1: where the tokens of each place start, and the end of all.
        first_key_e1: ``mine * num_tokens`` of this rank's experts, and of what follows the last.
    """

    order: tuple[int, ...]
    facts: str
    expected: int
    num_choices: int
    num_experts: int
    num_tokens: int
    id_dtype: torch.dtype
    steps: int
    received: tuple[int, ...]
    order_P: torch.Tensor
    place_of_id_E: torch.Tensor
    mine_of_id_E: torch.Tensor
    status_P: torch.Tensor
    step_GS: torch.Tensor
    token_of_G: torch.Tensor
    place_of_G: torch.Tensor
    start_P1: torch.Tensor
    first_key_e1: torch.Tensor

    @classmethod
    def of(
        cls,
        sharding: TokenSharding,
        experts: Partition,
        *,
        rank: int,
        num_choices: int,
        dim: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        facts: str = "",
        also: str = "",
    ) -> "Grid":
        """Made once for a call of these arguments, and kept by the sharding: all layers of a step use the same.

        Args:
            dtype, facts, also: as in :func:`plan_dispatch`.
        """
        key = (cls, experts, rank, num_choices, dim, device, dtype, facts, also)

        def make() -> "Grid":
            told = facts or facts_of(num_choices, dim, sharding, experts, dtype)
            return cls._made(sharding, experts, rank, num_choices, f"{also}, {told}" if also else told, device)

        return sharding.keep(key, make)

    def by_rank(self, of_places: Sequence[int]) -> tuple[int, ...]:
        """What belongs to each place, in the order of the ranks."""
        return tuple(value for _, value in sorted(zip(self.order, of_places, strict=True)))

    @property
    def ids_of_token(self) -> int:
        """How many ids the steps of a token have room for: K or a few more."""
        return self.steps * WORD.itemsize // self.id_dtype.itemsize

    @classmethod
    @torch.inference_mode(False)  # it outlives the call
    def _made(
        cls,
        sharding: TokenSharding,
        experts: Partition,
        rank: int,
        num_choices: int,
        facts: str,
        device: torch.device,
    ) -> "Grid":
        # One id takes one byte while 0 ("no expert") and E ids fit in it, else two.
        id_dtype = torch.uint8 if experts.total <= 255 else torch.int16
        steps = -(-num_choices * id_dtype.itemsize // WORD.itemsize)
        order = (*(r for r in range(sharding.num_ranks) if r != rank), rank)
        order_P = torch.tensor(order, device=device)
        place_of_rank_P = order_P.argsort()
        sizes, starts = sharding.local_sizes, sharding.local_starts
        start_P1 = torch.tensor([0, *accumulate(sizes[r] for r in order)], device=device)
        rank_of_G = sharding.stacked_ranks(device)
        g_by_place_G = place_of_rank_P[rank_of_G].argsort(stable=True)
        first_step_G = torch.arange(len(rank_of_G), device=device) * steps + rank_of_G + 1
        step_GS = first_step_G[g_by_place_G].unsqueeze(1) + torch.arange(steps, device=device)
        expert_E = torch.arange(experts.total, device=device)
        first, num_mine = experts.offsets[rank], experts.sizes[rank]
        mine_E = (expert_E >= first) & (expert_E < first + num_mine)
        return cls(
            order=order,
            facts=facts,
            expected=digest(facts),
            num_choices=num_choices,
            num_experts=experts.total,
            num_tokens=sharding.num_tokens,
            id_dtype=id_dtype,
            steps=steps,
            received=tuple(1 + size * steps for size in sizes),
            order_P=order_P,
            place_of_id_E=torch.cat([expert_E.new_zeros(1), place_of_rank_P[experts.owner(expert_E)] + 1]),
            mine_of_id_E=torch.cat([expert_E.new_zeros(1), mine_E * (expert_E - first + 1)]),
            status_P=torch.tensor([start * steps + r for r, start in enumerate(starts)], device=device),
            step_GS=step_GS.flatten(),
            token_of_G=sharding.stacked_tokens(device)[g_by_place_G],
            place_of_G=place_of_rank_P[rank_of_G[g_by_place_G]],
            start_P1=start_P1,
            first_key_e1=torch.arange(1, num_mine + 2, device=device) * sharding.num_tokens,
        )


def facts_of(
    num_choices: int, dim: int, sharding: TokenSharding, experts: Partition, dtype: torch.dtype | None
) -> str:
    """What the ranks have to agree on, as text."""
    known_dtype = "" if dtype is None else f"{dtype}, "
    return f"{known_dtype}K = {num_choices}, dim = {dim}, experts = {experts.sizes}, {sharding}"
