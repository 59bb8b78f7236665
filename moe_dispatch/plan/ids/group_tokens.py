"""What a plan knows before any ids have come: facts and index tensors that depend on the call only."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...layout.on_device import ints_on
from ...layout.partition import Partition
from ...layout.sharding import TokenSharding
from ...layout.stacked import stacked_ranks, stacked_tokens
from ...wire.agreement import digest
from ...wire.exchange import gathered_starts
from .format import IdFormat


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupTokens:
    """The tokens of a group (G) as one rank plans with them: rank after rank, and this rank last.

    A rank's index in that order is its *peer* index (P): what a rank sends to itself comes last, and stays.

    Attributes:
        rank_of_peer: the ranks in that order.
        facts: what the ranks have to agree about, as text.
        expected: its digest, the word of a rank without a problem.
        num_choices, num_experts, num_tokens: K, E, and the tokens of the whole grid.
        id_format: how ids travel.
        message_steps: steps that each rank sends to each other, by rank.
        rank_of_peer_P: on the device.
        peer_of_id: table of 1 + peer of each expert's rank; 0 for "no expert".
        mine_of_id: table of 1 + number of each expert among this rank's; 0 for all others.
        step_of_ids_and_words: where the ids of each token are among the steps of all messages, token after token, and
            then where each rank's word is, by rank.
        token_of_G, peer_of_G: global token, and the peer that holds it.
        start_P1: where the tokens of each peer start, and the end of all.
        first_key_e1: ``mine * num_tokens`` of this rank's experts, and of what follows the last.
    """

    rank_of_peer: tuple[int, ...]
    facts: str
    expected: int
    num_choices: int
    num_experts: int
    num_tokens: int
    id_format: IdFormat
    message_steps: tuple[int, ...]
    rank_of_peer_P: Tensor
    peer_of_id: Tensor
    mine_of_id: Tensor
    step_of_ids_and_words: Tensor
    token_of_G: Tensor
    peer_of_G: Tensor
    start_P1: Tensor
    first_key_e1: Tensor

    def by_rank(self, of_peers: Sequence[int]) -> tuple[int, ...]:
        """What belongs to each peer, in the order of the ranks."""
        rank = self.rank_of_peer[-1]
        return (*of_peers[:rank], of_peers[-1], *of_peers[rank:-1])

    @classmethod
    @torch.inference_mode(False)  # it outlives the call
    def made(
        cls,
        sharding: TokenSharding,
        experts: Partition,
        rank: int,
        num_choices: int,
        *,
        facts: str,
        device: torch.device,
    ) -> "GroupTokens":
        """For ``rank``, whose tokens have ``num_choices`` ids each."""
        id_format = IdFormat.of(num_choices, experts.total)
        steps = id_format.steps
        rank_of_peer = (*(r for r in range(sharding.num_ranks) if r != rank), rank)
        rank_of_peer_P = ints_on(rank_of_peer, device)
        peer_of_rank_P = rank_of_peer_P.argsort()
        sizes = sharding.local_sizes
        message_steps = tuple(id_format.sent_steps(size, device.type) for size in sizes)
        rank_of_G = stacked_ranks(sharding, device)
        stacked_of_G = peer_of_rank_P[rank_of_G].argsort(stable=True)
        # Of each rank: where its message begins, and its first token. Before a token's ids: its rank's word, and the
        # ids of the rank's tokens before it.
        begins = zip(gathered_starts(message_steps, device.type), sharding.local_starts, strict=True)
        begins_P2 = ints_on(list(begins), device)
        message_G, start_G = begins_P2.index_select(0, rank_of_G).unbind(1)
        first_step_G = message_G + 1 + (torch.arange(len(rank_of_G), device=device) - start_G) * steps
        step_of_ids_GS = first_step_G[stacked_of_G].unsqueeze(1) + torch.arange(steps, device=device)
        expert_E = torch.arange(experts.total, device=device)
        first, num_mine = experts.offsets[rank], experts.sizes[rank]
        mine_E = (expert_E >= first) & (expert_E < first + num_mine)
        return cls(
            rank_of_peer=rank_of_peer,
            facts=facts,
            expected=digest(facts),
            num_choices=num_choices,
            num_experts=experts.total,
            num_tokens=sharding.num_tokens,
            id_format=id_format,
            message_steps=message_steps,
            rank_of_peer_P=rank_of_peer_P,
            peer_of_id=id_format.table(peer_of_rank_P[experts.owner(expert_E)] + 1, 0),
            mine_of_id=id_format.table(mine_E * (expert_E - first + 1), 0),
            step_of_ids_and_words=torch.cat([step_of_ids_GS.flatten(), begins_P2[:, 0]]),
            token_of_G=stacked_tokens(sharding, device)[stacked_of_G],
            peer_of_G=peer_of_rank_P[rank_of_G[stacked_of_G]],
            start_P1=ints_on([0, *accumulate(map(sizes.__getitem__, rank_of_peer))], device),
            first_key_e1=torch.arange(1, num_mine + 2, device=device) * sharding.num_tokens,
        )
