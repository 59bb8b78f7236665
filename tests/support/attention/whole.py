"""The whole of a case, the same on every rank, and one rank's share of what it gives."""

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from sp_attention import scaled_dot_product, ulysses_attention
from tests.support.attention.case import Attend, Case, Options
from tests.support.attention.masks import CROSS, KINDS
from tests.support.ranks import world
from tests.support.tensors import grad_of, leaf, share


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The tensors and options of a case, batch first, whole sequences, all heads; the same on every rank."""

    q_BLNH: Tensor
    k_BLGH: Tensor
    v_BLGH: Tensor
    grad_BLNH: Tensor
    options: Options

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype) -> "Whole":
        draw = torch.Generator().manual_seed(case.seed)
        (queries, keys), (heads, groups), (width, v_width) = case.lengths, case.num_heads, case.widths

        def randn(length: int, num: int, width: int) -> Tensor:
            return torch.randn(case.batch, length, num, width, generator=draw, dtype=torch.float64).to(dtype)

        options = KINDS[case.kind](case, draw)
        if case.scale is not None:
            options["scale"] = case.scale
        for name, value in options.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                options[name] = value.to(dtype)
        return cls(
            q_BLNH=randn(queries, heads, width),
            k_BLGH=randn(keys, groups, width),
            v_BLGH=randn(keys, groups, v_width),
            grad_BLNH=randn(queries, heads, v_width),
            options=options,
        )

    @property
    def learned(self) -> tuple[str, ...]:
        """The options that are differentiated."""
        return tuple(
            name for name, value in self.options.items() if isinstance(value, Tensor) and value.is_floating_point()
        )


def shares_of_ulysses(
    rank: int, case: Case, whole: Whole, attend: Attend | None = None, attention: Attend = ulysses_attention
) -> dict[str, Tensor]:
    """This rank's output and gradients; gradients of options are summed over the ranks."""
    parts = [(whole.q_BLNH, case.seq), (whole.k_BLGH, case.kv_seq), (whole.v_BLGH, case.kv_seq)]
    q_BlNH, k_BlGH, v_BlGH = (leaf(share(x, sizes, case.order, rank)) for x, sizes in parts)
    options: Options = dict(whole.options) | {name: leaf(whole.options[name]) for name in whole.learned}
    sharding, kv_sharding = (
        TokenSharding(batch=case.batch, seq=Partition(sizes), order=case.order) for sizes in (case.seq, case.kv_seq)
    )
    out_BlNH = attention(
        q_BlNH,
        k_BlGH,
        v_BlGH,
        sharding=sharding,
        group=world(),
        kv_sharding=kv_sharding if case.kind in CROSS else None,
        heads=None if case.heads is None else Partition(case.heads),
        attend=attend,
        **options,
    )
    out_BlNH.backward(share(whole.grad_BLNH, case.seq, case.order, rank))
    got = {"out": out_BlNH.detach(), "dq": grad_of(q_BlNH), "dk": grad_of(k_BlGH), "dv": grad_of(v_BlGH)}
    for name in whole.learned:
        grad = options[name].grad
        got[f"d {name}"] = torch.zeros_like(options[name]) if grad is None else grad
        dist.all_reduce(got[f"d {name}"])
    return got


def shares_of(answer: dict[str, Tensor], rank: int, case: Case) -> dict[str, Tensor]:
    sizes = {"out": case.seq, "dq": case.seq, "dk": case.kv_seq, "dv": case.kv_seq}
    return {
        name: share(whole, sizes[name], case.order, rank) if name in sizes else whole
        for name, whole in answer.items()
    }


def whole_answer(attend: Attend, whole: Whole) -> dict[str, Tensor]:
    """Output and gradients of ``attend`` on the whole tensors."""
    q_BLNH, k_BLGH, v_BLGH = (leaf(x) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH))
    options: Options = dict(whole.options) | {name: leaf(whole.options[name]) for name in whole.learned}
    out_BLNH = attend(q_BLNH, k_BLGH, v_BLGH, **options)
    out_BLNH.backward(whole.grad_BLNH)
    answer = {"out": out_BLNH.detach(), "dq": grad_of(q_BLNH), "dk": grad_of(k_BLGH), "dv": grad_of(v_BLGH)}
    return answer | {f"d {name}": grad_of(options[name]) for name in whole.learned}


@dataclass(frozen=True, slots=True)
class Seen:
    """What ``attend`` was called with."""

    shapes: tuple[tuple[int, ...], ...]
    options: Options


def recording(seen: list[Seen]) -> Attend:
    """The default ``attend``, that adds each of its calls to ``seen``."""

    @wraps(scaled_dot_product)
    def attend(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, **options: Any) -> Tensor:
        seen.append(Seen((tuple(q_BLnH.shape), tuple(k_BLgH.shape), tuple(v_BLgH.shape)), options))
        return scaled_dot_product(q_BLnH, k_BLgH, v_BLgH, **options)

    return attend
