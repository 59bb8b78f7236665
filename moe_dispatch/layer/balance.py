"""The sequence-wise balance loss, right for a sequence that is spread over ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.sharding import TokenSharding
from ..wire.exchange import check_group
from ..wire.policies import unseen_by_policies


def sequence_balance_loss(
    scores_BlE: Tensor, *, top_k: int, sharding: TokenSharding, group: dist.ProcessGroup
) -> Tensor:
    """This rank's share of the balance loss of DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20), without its factor
    alpha.

    Per sequence it is ``sum_i f_i P_i``: ``f_i`` counts how often expert i is among the K best *unbiased* scores of a
    token, times E / (K L); ``P_i`` is the mean over the sequence of the scores, normalised to sum 1 over the experts.
    The loss is the mean over sequences. A token whose scores are all 0, which :class:`MoE` gives at padding, is not
    there: L counts the others, and a sequence of padding is none.

    ``f`` carries no gradient and ``P`` is a sum over tokens. So only counts travel (one all-reduce of B * (E + 1)
    numbers, none in backward), and each rank weighs its own tokens with the counts of whole sequences.

    Args:
        scores_BlE: (b, l, E), or (l, b, E), scores of this rank's tokens, as the router or the layer gives them.
        top_k: K.
        sharding: the tokens that ``group`` holds: whole sequences, so all of the grid.
        group: its ranks.

    Returns:
        () share: summed over the ranks of ``group``, it is the loss. Backpropagate it on every rank and *sum* the
        gradients.

    Raises:
        ValueError: scores that are not this rank's shard, a sharding that leaves tokens out, a group of another size.
    """
    check_group(group, sharding.num_ranks, "the token sharding")
    sharding.check_whole("sequence_balance_loss")
    rank = group.rank()
    sharding.check_local(scores_BlE, rank)
    scores_tE = scores_BlE.flatten(0, 1)
    row_of_token_t = sharding.rows(rank, scores_tE.device)
    count_BE, length_B = _counts_of_rows(scores_tE.detach(), top_k, row_of_token_t, sharding.batch.total, group)
    frequency_BE = count_BE * (scores_tE.shape[1] / top_k) / length_B.clamp(min=1).unsqueeze(1)
    part_of_loss_B = 1 / (length_B.clamp(min=1) * length_B.count_nonzero().clamp(min=1))
    probability_tE = scores_tE / (scores_tE.sum(1, keepdim=True) + 1e-20)
    return ((frequency_BE * part_of_loss_B.unsqueeze(1))[row_of_token_t] * probability_tE).sum()


@unseen_by_policies
def _counts_of_rows(
    scores_tE: Tensor, top_k: int, row_of_token_t: Tensor, rows: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(rows, E): how often an expert is among the best of a token of each row, on all ranks; (rows,): of how many
    tokens."""
    is_token_t1 = (scores_tE != 0).any(1, keepdim=True).to(scores_tE.dtype)
    chosen_tE = torch.zeros_like(scores_tE).scatter(1, scores_tE.topk(top_k, dim=1).indices, 1.0) * is_token_t1
    count_BE1 = scores_tE.new_zeros(rows, scores_tE.shape[1] + 1)
    count_BE1.index_add_(0, row_of_token_t, torch.cat([chosen_tE, is_token_t1], dim=1))
    sum_counts(count_BE1, group)
    return count_BE1[:, :-1], count_BE1[:, -1]


def sum_counts(count: Tensor, group: dist.ProcessGroup) -> None:
    """Sum ``count`` over the ranks of ``group``, in place. A group of one rank communicates nothing."""
    if group.size() > 1:
        dist.all_reduce(count, group=group)
