"""What a plan by counts knows before it hears of its peers. Nothing here is as long as the tokens of all ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...layout.on_device import ints_on
from ...wire.agreement import digest
from ..ids.format import STEP, IdFormat
from ..terms import Terms

MOST_TOKENS = torch.iinfo(STEP).max  # a token's number rides in 4 bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CountsFacts:
    """Tokens and experts of a group as one rank plans by counts with them.

    *Peers* (P) are the ranks with this one last, as in :class:`GroupTokens`.

    Attributes:
        facts: what the ranks have to agree about, as text.
        expected: its digest, the word of a rank without a problem.
        num_choices, num_experts, num_tokens: K, E, and the tokens of the whole grid.
        num_mine: experts of this rank.
        id_format: how ids travel.
        message_steps: of 4 bytes, from each rank to each.
        rank_P1: all ranks, and "no rank", which is behind the last.
        peer_of_rank_P1: of each, and the number of ranks for "no rank".
        rank_of_id: table of the rank of each expert; "no rank" for "no expert".
        mine_of_id: table of 1 + number of each expert among this rank's; 0 for all others.
        step_of_id: table of where choices of each expert are counted among all messages; those of "no expert" where a
            word is written later.
        one: a choice, as it is counted.
        number_t: global token of this rank's tokens, int32.
    """

    facts: str
    expected: int
    num_choices: int
    num_experts: int
    num_tokens: int
    num_mine: int
    id_format: IdFormat
    message_steps: int
    rank_P1: Tensor
    peer_of_rank_P1: Tensor
    rank_of_id: Tensor
    mine_of_id: Tensor
    step_of_id: Tensor
    one: Tensor
    number_t: Tensor

    @property
    def num_ranks(self) -> int:
        return self.peer_of_rank_P1.shape[0] - 1

    @classmethod
    def of(cls, terms: Terms, rank: int, num_choices: int, device: torch.device) -> "CountsFacts":
        """For ``rank``. Made once and kept by the sharding, so that all layers of a step use the same.

        Raises:
            ValueError: more tokens than 4 bytes can number. Every rank sees it, before any collective.
        """
        if terms.sharding.num_tokens > MOST_TOKENS:
            raise ValueError(
                f"{terms.sharding.num_tokens} tokens in one plan over {terms.sharding.num_ranks} ranks; their "
                f"numbers travel in 4 bytes, so plan for at most {MOST_TOKENS} at once"
            )
        return terms.sharding.keep(
            (cls, rank, device, *terms.key(num_choices)), lambda: cls._made(terms, rank, num_choices, device)
        )

    @classmethod
    @torch.inference_mode(False)  # it outlives the call
    def _made(cls, terms: Terms, rank: int, num_choices: int, device: torch.device) -> "CountsFacts":
        experts, facts = terms.experts, terms.facts(num_choices)
        ranks, steps = len(experts), message_steps(max(experts.sizes))
        rank_P1 = torch.arange(ranks + 1, device=device)
        peer_of_rank_P1 = (rank_P1 - (rank_P1 > rank).to(torch.int64)).masked_fill_(rank_P1 == rank, ranks - 1)
        expert_E = torch.arange(experts.total, device=device)
        offset_P = ints_on(experts.offsets, device)
        rank_of_expert_E = torch.searchsorted(offset_P, expert_E, right=True) - 1
        number_of_expert_E = expert_E - offset_P[rank_of_expert_E]  # among those of its rank
        step_of_expert_E = rank_of_expert_E * steps + HEAD_STEPS + number_of_expert_E
        mine_of_expert_E = (rank_of_expert_E == rank) * (number_of_expert_E + 1)
        id_format = IdFormat.of(num_choices, experts.total)
        return cls(
            facts=facts,
            expected=digest(facts),
            num_choices=num_choices,
            num_experts=experts.total,
            num_tokens=terms.sharding.num_tokens,
            num_mine=experts.sizes[rank],
            id_format=id_format,
            message_steps=steps,
            rank_P1=rank_P1,
            peer_of_rank_P1=peer_of_rank_P1.index_fill_(0, rank_P1[-1:], ranks),
            rank_of_id=id_format.table(rank_of_expert_E, ranks),
            mine_of_id=id_format.table(mine_of_expert_E, 0),
            step_of_id=id_format.table(step_of_expert_E, 0),
            one=torch.ones(1, dtype=STEP, device=device),
            number_t=terms.sharding.tokens(rank, device).to(STEP),
        )


HEAD_STEPS = 2  # of a message: a word, and the number of rows that will come
LEAST_STEPS = 8  # room for 6 experts


def message_steps(most_experts: int) -> int:
    """Steps of the message between two ranks, for ranks with at most so many experts: a power of two. So each starts
    at a multiple of 16 bytes, and ranks that are only a little wrong about the experts still send as much as their
    peers expect, and are told apart by their words."""
    return max(1 << (HEAD_STEPS + most_experts - 1).bit_length(), LEAST_STEPS)


def message_bytes(most_experts: int) -> int:
    """The same in bytes."""
    return STEP.itemsize * message_steps(most_experts)
