"""The usual implementations, plain and fair: what most training code does, without its detours.

Dispatch: sort the choices by expert, send one row per choice, weigh and sum with ``index_add`` where the token lives.
Ulysses: one all-to-all each for q, k, v and the output, for even shards; what it is around is a sum, or torch's
attention.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..workloads.attention import AttentionWorkload
from ..workloads.dispatch import DispatchWorkload
from ..workloads.ulysses import UlyssesWorkload, add_heads
from .protocol import NotApplicable


class TextbookDispatch:
    """Collectives: counts, rows, rows back; two backward. One host sync, for the counts."""

    kind = "dispatch"

    def __init__(self, workload: DispatchWorkload, group: dist.ProcessGroup) -> None:
        self.group, self.experts, self.ranks = group, workload.experts, group.size()
        self.rank_of_expert_E = self.experts.owner(torch.arange(self.experts.total))

    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        num_choices, mine = expert_tK.shape[1], self.experts.sizes[self.group.rank()]
        expert_C, order_C = expert_tK.flatten().sort(stable=True)
        count_E = torch.zeros(self.experts.total, dtype=torch.int64).scatter_add_(
            0, expert_C, expert_C.new_ones(len(expert_C))
        )
        count_Pe = count_E.new_empty(self.ranks * mine)
        dist.all_to_all_single(count_Pe, count_E, [mine] * self.ranks, list(self.experts.sizes), group=self.group)
        count_Pe = count_Pe.view(self.ranks, mine)
        sent_P = torch.zeros(self.ranks, dtype=torch.int64).scatter_add_(0, self.rank_of_expert_E, count_E)
        sent, received = torch.stack([sent_P, count_Pe.sum(1)]).cpu().tolist()

        token_C = order_C // num_choices
        x_MD = Exchange.apply(x_tD.index_select(0, token_C), sent, received, self.group)
        # rows came by (rank, expert); experts want them by (expert, rank)
        expert_M = (
            torch.arange(mine).repeat(self.ranks).repeat_interleave(count_Pe.flatten(), output_size=sum(received))
        )
        received_of_row_M = expert_M.argsort(stable=True)
        x_MD = x_MD.index_select(0, received_of_row_M)

        y_MD = x_MD  # the experts

        row_of_received_M = torch.empty_like(received_of_row_M)
        row_of_received_M[received_of_row_M] = torch.arange(len(received_of_row_M))
        y_CD = Exchange.apply(y_MD.index_select(0, row_of_received_M), received, sent, self.group)
        weight_C1 = weight_tK.flatten().index_select(0, order_C).unsqueeze(1)
        return torch.zeros(x_tD.shape).index_add(0, token_C, y_CD * weight_C1).to(x_tD.dtype)


class TextbookUlysses:
    """Four collectives forward, four backward. Head counts and lengths that the ranks divide."""

    kind = "ulysses"

    def __init__(self, workload: UlyssesWorkload | AttentionWorkload, group: dist.ProcessGroup) -> None:
        ranks = group.size()
        for what, sizes in (
            ("tokens", workload.sharding.places.lengths.sizes),
            ("query heads", workload.heads.sizes),
        ):
            if len(set(sizes)) > 1:
                raise NotApplicable(f"needs even shards; {what} per rank are {sizes}")
        if workload.num_kv % ranks:
            raise NotApplicable(f"needs key/value heads that {ranks} ranks divide; there are {workload.num_kv}")
        self.group, self.ranks = group, ranks

    def forward(self, q_BlNH: Tensor, k_BlGH: Tensor, v_BlGH: Tensor) -> Tensor:
        q_BLnH, k_BLgH, v_BLgH = (self.heads_from_tokens(x) for x in (q_BlNH, k_BlGH, v_BlGH))
        return self.tokens_from_heads(self.attend(q_BLnH, k_BLgH, v_BLgH))

    def attend(self, q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
        return add_heads(q_BLnH, k_BLgH, v_BLgH)

    def heads_from_tokens(self, x_BlNH: Tensor) -> Tensor:
        sent_PBlnH = x_BlNH.unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()
        received_PBlnH = self.exchange(sent_PBlnH)
        return received_PBlnH.permute(1, 0, 2, 3, 4).contiguous().flatten(1, 2)

    def tokens_from_heads(self, x_BLnH: Tensor) -> Tensor:
        sent_PBlnH = x_BLnH.unflatten(1, (self.ranks, -1)).permute(1, 0, 2, 3, 4).contiguous()
        received_PBlnH = self.exchange(sent_PBlnH)
        return received_PBlnH.permute(1, 2, 0, 3, 4).contiguous().flatten(2, 3)

    def exchange(self, x_PBlnH: Tensor) -> Tensor:
        one_each = [1] * self.ranks
        return Exchange.apply(x_PBlnH, one_each, one_each, self.group)  # type: ignore[return-value]


class TextbookAttention(TextbookUlysses):
    """The same around torch's ``scaled_dot_product_attention``, whose only window is a mask of (L, L)."""

    kind = "attention"

    def __init__(self, workload: AttentionWorkload, group: dist.ProcessGroup) -> None:
        super().__init__(workload, group)
        self.mask: dict[str, Any] = {"is_causal": True}
        if workload.window >= 0:
            length = workload.sharding.seq.total
            in_window_LL = torch.ones(length, length, dtype=torch.bool).tril_().triu_(-workload.window)
            self.mask = {"attn_mask": in_window_LL}

    def attend(self, q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
        q_BnLH, k_BgLH, v_BgLH = (x.transpose(1, 2) for x in (q_BLnH, k_BLgH, v_BLgH))
        return F.scaled_dot_product_attention(q_BnLH, k_BgLH, v_BgLH, **self.mask, enable_gqa=True).transpose(1, 2)


class Exchange(torch.autograd.Function):
    """All-to-all of rows; the backward is the same with the counts swapped."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows, received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows = grads[0].contiguous()
        out = rows.new_empty(sum(ctx.sent), *rows.shape[1:])
        dist.all_to_all_single(out, rows, ctx.sent, ctx.received, group=ctx.group)
        return out, None, None, None
