"""What a plan knows before any routing has come: facts and index tensors that depend on the call only, not on ids."""

from dataclasses import dataclass

import torch

from .agreement import digest
from .partition import Partition
from .sharding import TokenSharding

# A message is a word of 4 bytes and ids in steps of 4 bytes: never more than 2 K + 8 bytes for each token and rank.
WORD = torch.int32
WORDS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """The tokens of a group, rank after rank (G), as the routing exchange delivers them to ``rank``.

    Attributes:
        facts: what the ranks have to agree on, as text.
        expected: its digest, the status word of a rank without a problem.
        num_choices, num_experts, num_tokens: K, E, and the tokens of the whole grid.
        id_dtype: in which ids travel, plus one, 0 for "no expert".
        steps: of 4 bytes, that the ids of a token take.
        received: steps that come from each rank, the status word included.
        rank_of_id_E: 1 + rank of each expert, by id plus one; 0 for "no expert".
        place_of_id_E: 1 + number of each expert among this rank's; 0 for all others.
        status_P: step of each rank's status word, among the steps of all messages.
        step_GS: the steps of all tokens' ids.
        token_of_G, rank_of_G: global token, and the rank that holds it.
        start_P1: where each rank's tokens start, and the end of all.
        first_key_e1: ``place * num_tokens`` of this rank's experts, and of what follows the last.
    """

    facts: str
    expected: int
    num_choices: int
    num_experts: int
    num_tokens: int
    id_dtype: torch.dtype
    steps: int
    received: tuple[int, ...]
    rank_of_id_E: torch.Tensor
    place_of_id_E: torch.Tensor
    status_P: torch.Tensor
    step_GS: torch.Tensor
    token_of_G: torch.Tensor
    rank_of_G: torch.Tensor
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
    ) -> "Grid":
        """Made once for a call of these arguments, and kept by the sharding: all layers of a step use the same.

        Args:
            dtype, facts: as in :func:`plan_dispatch`.
        """
        key = (cls, experts, rank, num_choices, dim, device, dtype, facts)

        def make() -> "Grid":
            told = facts or facts_of(num_choices, dim, sharding, experts, dtype)
            return cls._made(sharding, experts, rank, num_choices, told, device)

        return sharding.keep(key, make)

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
        starts, rank_of_G = sharding.local_starts, sharding.stacked_ranks(device)
        first_step_G = torch.arange(len(rank_of_G), device=device) * steps + rank_of_G + 1
        expert_E = torch.arange(experts.total, device=device)
        first, num_mine = experts.offsets[rank], experts.sizes[rank]
        mine_E = (expert_E >= first) & (expert_E < first + num_mine)
        return cls(
            facts=facts,
            expected=digest(facts) % WORDS,
            num_choices=num_choices,
            num_experts=experts.total,
            num_tokens=sharding.num_tokens,
            id_dtype=id_dtype,
            steps=steps,
            received=tuple(1 + size * steps for size in sharding.local_sizes),
            rank_of_id_E=torch.cat([expert_E.new_zeros(1), experts.owner(expert_E) + 1]),
            place_of_id_E=torch.cat([expert_E.new_zeros(1), mine_E * (expert_E - first + 1)]),
            status_P=torch.tensor([start * steps + rank for rank, start in enumerate(starts)], device=device),
            step_GS=(first_step_G.unsqueeze(1) + torch.arange(steps, device=device)).flatten(),
            token_of_G=sharding.stacked_tokens(device),
            rank_of_G=rank_of_G,
            start_P1=torch.tensor((*starts, len(rank_of_G)), device=device),
            first_key_e1=torch.arange(1, num_mine + 2, device=device) * sharding.num_tokens,
        )


def facts_of(
    num_choices: int, dim: int, sharding: TokenSharding, experts: Partition, dtype: torch.dtype | None
) -> str:
    """What the ranks have to agree on, as text."""
    known_dtype = "" if dtype is None else f"{dtype}, "
    return f"{known_dtype}K = {num_choices}, dim = {dim}, experts = {experts.sizes}, {sharding}"
