"""torch's own context parallel, with the kernel of the CPU in its templates.

``context_parallel`` replaces ``scaled_dot_product_attention`` by a ring of calls of one kernel, for CUDA's kernels
only. The ring itself is a private template that is given the kernel: with that of the CPU it runs here as it is. The
template reads how to send keys, and whether tokens are in zigzag order, from one object of its module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..workloads.attention import AttentionWorkload, Order
from .protocol import NotApplicable

TEMPLATES = "torch.distributed.tensor.experimental._context_parallel._attention"
SEQ_DIM = 2  # of (B, N, l, H)


class TorchRing:
    """Keys by one all-gather ("ALL_GATHER", torch's default) or from neighbour to neighbour ("ALL_TO_ALL"); their
    gradients always from neighbour to neighbour."""

    kind = "attention"

    def __init__(
        self,
        workload: AttentionWorkload,
        group: dist.ProcessGroup,
        *,
        rotate: Literal["ALL_GATHER", "ALL_TO_ALL"],
        order: Order,
    ) -> None:
        self.sharding = workload.in_order(order)
        pieces = self.sharding.seq.sizes
        if workload.window >= 0:
            raise NotApplicable("torch's context parallel has no window")
        if len(set(pieces)) > 1:
            raise NotApplicable(f"torch's context parallel needs even shards; in {order} order pieces are {pieces}")
        self.templates, self.group = import_module(TEMPLATES), group
        self.scale = workload.head_dim**-0.5
        self.options = {
            "enable_load_balance": order == "zigzag",
            "convert_to_f32": workload.dtype != torch.float64,
            "rotate_method": self.templates._RotateMethod[rotate],
        }

    def forward(self, q_BlNH: Tensor, k_BlGH: Tensor, v_BlGH: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q_BlNH, k_BlGH, v_BlGH))
        return _Ring.apply(self, *heads_first).transpose(1, 2)  # type: ignore[union-attr]

    @contextmanager
    def told(self) -> Iterator[None]:
        """The template reads our options inside the block; afterwards all is as it was."""
        shared = self.templates._cp_options
        before = {name: getattr(shared, name) for name in self.options}
        try:
            for name, value in self.options.items():
                setattr(shared, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(shared, name, value)


class _Ring(torch.autograd.Function):
    """forward   out = attention, and the log of the sum of the powers of each query, piece after piece of the keys
    backward  gradients of q, k, v by the kernel's own backward, piece after piece
    """

    @staticmethod
    def forward(ctx: Any, ring: TorchRing, q_BNlH: Tensor, k_BGlH: Tensor, v_BGlH: Tensor) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        with ring.told():
            out_BNlH, lse_BNl = ring.templates._templated_ring_attention(
                ring.group, SEQ_DIM, kernel, q_BNlH, k_BGlH, v_BGlH, is_causal=True, scale=ring.scale
            )
        ctx.ring = ring
        ctx.save_for_backward(q_BNlH, k_BGlH, v_BGlH, out_BNlH, lse_BNl)
        return out_BNlH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernel, ring = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, ctx.ring
        with ring.told():
            dq_BNlH, dk_BGlH, dv_BGlH = ring.templates._templated_ring_attention_backward(
                ring.group, SEQ_DIM, kernel, grads[0], "grad_out", *ctx.saved_tensors, True, dropout_p=0.0,
                scale=ring.scale,
            )  # fmt: skip
        return None, dq_BNlH, dk_BGlH, dv_BGlH
