"""Causal attention in float64 from its definition, a block of queries at a time: what contenders are checked with.

It shares no code with any of them. Each rank computes its own heads, so that long sequences take seconds.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .attention import AttentionWorkload

BLOCK = 512  # queries whose products with all keys are in memory at once


def exact_attention(workload: AttentionWorkload, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and the gradients of q, k and v, float64, of every token. Every rank of ``group`` calls it."""
    q_BLNH, k_BLGH, v_BLGH, grad_BLNH = workload.whole
    results = [torch.zeros(x.shape, dtype=torch.float64) for x in (q_BLNH, q_BLNH, k_BLGH, v_BLGH)]
    start, size = (of_rank[group.rank()] for of_rank in (workload.heads.offsets, workload.heads.sizes))
    for head in range(start, start + size):
        kv_head = head // (workload.heads.total // workload.num_kv)
        for row in range(len(q_BLNH)):
            of_head = (
                q_BLNH[row, :, head],
                k_BLGH[row, :, kv_head],
                v_BLGH[row, :, kv_head],
                grad_BLNH[row, :, head],
            )
            sums = [x[row, :, n] for x, n in zip(results, (head, head, kv_head, kv_head), strict=True)]
            _add_head(of_head, sums, workload.window)
    for x in results:
        dist.all_reduce(x, group=group)
    out, grad_q, grad_k, grad_v = results
    return out, grad_q, grad_k, grad_v


def _add_head(of_head: tuple[Tensor, ...], sums: list[Tensor], window: int) -> None:
    """Add one head's output and gradients, each (L, H), to ``sums``."""
    length, width = of_head[0].shape
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        first = 0 if window < 0 else max(start - window, 0)
        seen = (slice(start, stop), slice(first, stop), slice(first, stop), slice(start, stop))
        *leaves, grad = (x[of].to(torch.float64, copy=True) for x, of in zip(of_head, seen, strict=True))
        for x in leaves:
            x.requires_grad_()
        ahead = torch.arange(start, stop)[:, None] - torch.arange(first, stop)  # places from a key to the query
        closed = (ahead < 0) | ((ahead > window) & (window >= 0))
        product = leaves[0] @ leaves[1].T * width**-0.5
        out = product.masked_fill(closed, -torch.inf).softmax(-1) @ leaves[2]
        grads = torch.autograd.grad(out, leaves, grad)
        sums[0][start:stop] = out.detach()
        sums[1][start:stop] = grads[0]
        sums[2][first:stop] += grads[1]
        sums[3][first:stop] += grads[2]
