"""``python -m sp_attention``: does attention over 4 ranks equal attention on one, here and now?

Random float64 tensors, on the CPU, against :func:`reference_attention`: outputs and the gradients of q, k and v.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import check_is_group
from moe_dispatch.testing import RankPool

from .call.over_ranks import attention_over_ranks
from .reference import reference_attention
from .work.scheme import ULYSSES, Scheme

RANKS = 4
TOLERANCE = 1e-12
HEADER = ("case", "tokens per rank", "q", "k", "v", "out", "dq", "dk", "dv", "verdict")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One call. ``seq`` and ``kv_seq`` are the pieces of the sequences, one per rank unless ``held`` tells those of
    each rank; ``heads`` (N, G), ``widths`` those of q and v."""

    name: str
    seq: tuple[int, ...]
    kv_seq: tuple[int, ...] | None = None
    held: tuple[tuple[int, ...], ...] | None = None
    batch: int = 2
    heads: tuple[int, int] = (4, 4)
    widths: tuple[int, int] = (8, 8)
    order: Literal["BL", "LB"] = "BL"
    nan_at: tuple[int, ...] = ()
    scheme: Scheme = ULYSSES
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shardings(self) -> tuple[TokenSharding, TokenSharding, TokenSharding]:
        """Of q, k and v."""
        query, kv = (
            TokenSharding(batch=self.batch, seq=Partition(seq), held=self.held, order=self.order)
            for seq in (self.seq, self.kv_seq or self.seq)
        )
        return query, kv, kv

    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of the output, whole and batch first, the same in every process."""
        draw = torch.Generator().manual_seed(sum(self.name.encode()))
        (num_heads, num_kv), (width, v_width) = self.heads, self.widths
        lengths = sum(self.seq), sum(self.kv_seq or self.seq)
        shapes = [
            (lengths[0], num_heads, width),
            (lengths[1], num_kv, width),
            (lengths[1], num_kv, v_width),
            (lengths[0], num_heads, v_width),
        ]
        tensors = [torch.randn(self.batch, *shape, generator=draw, dtype=torch.float64) for shape in shapes]
        for x_BLNH in tensors:
            x_BLNH[:, list(self.nan_at)] = torch.nan
        return tuple(tensors)

    def in_order(self, x_BLNH: Tensor) -> Tensor:
        """From batch first to the order of the sharding, or back."""
        return x_BLNH if self.order == "BL" else x_BLNH.transpose(0, 1)


def cases() -> list[Case]:
    """What goes wrong elsewhere."""
    real_BL = torch.arange(11) < torch.tensor([[11], [6]])
    packed = {"cu_seqlens": torch.tensor([0, 5, 5, 6, 12]), "cu_seqlens_padded": torch.tensor([0, 7, 7, 8, 17])}
    causal = {"is_causal": True}
    return [
        Case(name="uneven lengths", seq=(2, 2, 2, 1), options=causal),
        Case(name="fewer tokens than ranks", seq=(1, 0, 1, 1), options=causal),
        Case(name="fewer heads than ranks", seq=(3, 3, 2, 2), heads=(3, 3), options=causal),
        Case(name="groups that straddle ranks", seq=(3, 3, 2, 2), heads=(6, 2), options=causal),
        Case(name="widths of MLA", seq=(3, 2, 2, 2), widths=(192, 128), options=causal),
        Case(name="sliding window", seq=(4, 4, 4, 3), options={"window": (5, 0)}),
        Case(name="key padding", seq=(3, 3, 3, 2), options={"key_padding_mask": real_BL}),
        Case(
            name="packed, NaN between",
            seq=(7, 0, 4, 8),
            batch=1,
            nan_at=(5, 6, 14, 15, 16, 17, 18),
            options=causal | packed,
        ),
        Case(name="sinks", seq=(2, 2, 2, 1), options=causal | {"sinks_N": torch.arange(4.0, dtype=torch.float64)}),
        Case(name="cross-attention", seq=(2, 1, 1, 1), kv_seq=(0, 5, 4, 2), heads=(4, 2), options=causal),
        Case(
            name="zigzag order",
            seq=(2, 1, 2, 1, 2, 1, 1, 1),
            held=((0, 7), (1, 6), (2, 5), (3, 4)),
            heads=(4, 2),
            options=causal,
        ),
        Case(name="sequence first", seq=(3, 0, 5, 1), order="LB", heads=(6, 3), options=causal),
        Case(
            name="gathered keys, zigzag",
            seq=(2, 1, 2, 1, 2, 1, 1, 1),
            held=((0, 7), (1, 6), (2, 5), (3, 4)),
            heads=(3, 1),
            options=causal,
            scheme=Scheme.gather(),
        ),
        Case(
            name="ring keys, packed, NaN",
            seq=(7, 0, 4, 8),
            batch=1,
            nan_at=(5, 6, 14, 15, 16, 17, 18),
            options=causal | packed,
            scheme=Scheme.ring(),
        ),
        Case(
            name="2 x 2, window, chunks",
            seq=(4, 4, 4, 3),
            heads=(3, 3),
            options={"window": (5, 0)},
            scheme=Scheme.two_dimensional(head_ranks=2, chunk=2),
        ),
    ]


def on_rank(rank: int, case: Case) -> list[Tensor]:
    """This rank's part of the output and of the gradients of q, k and v."""
    group = check_is_group(dist.group.WORLD)
    *inputs, grad_BLNH = case.tensors()
    q_BlNH, k_BlGH, v_BlGH = (
        sharding.shard(case.in_order(x), rank).clone().requires_grad_()
        for x, sharding in zip(inputs, case.shardings, strict=True)
    )
    sharding, kv_sharding, _ = case.shardings
    shardings: dict[str, Any] = {"sharding": sharding, "kv_sharding": kv_sharding}
    out_BlNH = attention_over_ranks(
        q_BlNH, k_BlGH, v_BlGH, group=group, scheme=case.scheme, **shardings, **case.options
    )
    grad_BlNH = sharding.shard(case.in_order(grad_BLNH), rank)
    return [out_BlNH.detach(), *torch.autograd.grad(out_BlNH, (q_BlNH, k_BlGH, v_BlGH), grad_BlNH)]


def on_one(case: Case) -> list[Tensor]:
    """The whole output and gradients, by the reference."""
    *inputs, grad_BLNH = case.tensors()
    inputs = [x.requires_grad_() for x in inputs]
    out_BLNH = reference_attention(*inputs, **case.options)
    # The output at padding is 0 whatever the inputs are: its gradient is none.
    return [out_BLNH.detach(), *torch.autograd.grad(out_BLNH, inputs, grad_BLNH.nan_to_num(0.0))]


def compared(case: Case, pool: RankPool) -> list[float]:
    """max |difference| of the output, dq, dk and dv; NaN where either has one."""
    parts = zip(*pool.run(on_rank, RANKS, case), strict=True)
    shardings = (case.shardings[0], *case.shardings)
    wholes = [case.in_order(sharding.unshard(part)) for sharding, part in zip(shardings, parts, strict=True)]
    return [(x - y).abs().max().item() for x, y in zip(wholes, on_one(case), strict=True)]


def report(pool: RankPool) -> int:
    """Print the table; 0 if all cases agree, else 1."""
    rows: list[tuple[str, ...]] = [HEADER]
    status = 0
    for case in cases():
        differences = compared(case, pool)
        agrees = all(difference <= TOLERANCE for difference in differences)
        status |= not agrees
        shardings = case.shardings[: 2 if case.kv_seq else 1]
        tokens = " ".join("+".join(map(str, sharding.places.lengths.sizes)) for sharding in shardings)
        shapes = ["x".join(map(str, case.in_order(x).shape)) for x in case.tensors()[:3]]
        numbers = [f"{difference:.1e}" for difference in differences]
        rows.append((case.name, tokens, *shapes, *numbers, "agrees" if agrees else "DIFFERS"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return int(status)


def main(arguments: Sequence[str] = ()) -> int:
    """The exit status; wrong usage ends in SystemExit(2), as argparse has it."""
    parser = argparse.ArgumentParser(
        prog="python -m sp_attention",
        description=f"Compare attention over {RANKS} ranks with one, on the CPU, in cases that go wrong elsewhere.",
        epilog="It takes no arguments. Exit status: 0 if all cases agree, 1 if not.",
    )
    parser.parse_args(arguments)
    print(f"attention over {RANKS} ranks and on one, float64: max |difference|, at most {TOLERANCE:g}\n", flush=True)
    with RankPool() as pool:
        return report(pool)


if __name__ == "__main__":
    # Ranks import functions by the name of their module, which is not "__main__" there.
    from sp_attention.__main__ import main as main_by_name

    sys.exit(main_by_name(sys.argv[1:]))
