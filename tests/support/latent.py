"""Keys and values of latents: a case with them, and what of it differs from the reference on one rank."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sp_attention import latent_attention_over_ranks
from sp_attention.reference import reference_attention
from tests.support.attention.case import Attend, Case
from tests.support.attention.masks import CROSS
from tests.support.attention.whole import Whole
from tests.support.orders import cut_by_loops
from tests.support.ranks import world
from tests.support.schemes import SpreadCase, sum_of
from tests.support.tensors import difference, grad_of, leaf

WIDE, TURNED = 5, 2  # columns of a latent: those that are expanded, and those that each head has as they are
NAMES = ("out", "dq", "dlatent", "dkey", "dvalue")


def expand(latent_BLC: Tensor, key_GCH: Tensor, value_GCV: Tensor, *, heads: range) -> tuple[Tensor, Tensor]:
    """As multi-head latent attention, but values are no linear map."""
    wide_BLC, turned_BLT = latent_BLC.split([WIDE, TURNED], dim=-1)
    key_gCH, value_gCV = (x[heads.start : heads.stop] for x in (key_GCH, value_GCV))
    k_BLgH = torch.einsum("blc,gch->blgh", wide_BLC, key_gCH)
    k_BLgT = turned_BLT[:, :, None].expand(-1, -1, len(heads), -1)
    return torch.cat([k_BLgH, k_BLgT], dim=-1), torch.einsum("blc,gcv->blgv", wide_BLC, value_gCV).tanh()


def latents(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, C), and the weights of all heads."""
    draw = torch.Generator().manual_seed(case.seed + 1)
    groups, (width, v_width) = case.num_heads[1], case.widths
    shapes = (
        (case.batch, case.lengths[1], WIDE + TURNED),
        (groups, WIDE, width - TURNED),
        (groups, WIDE, v_width),
    )
    latent, key, value = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return latent, key, value


@lru_cache(maxsize=8)  # ranks that are threads are at the same case, or one apart
def latent_answer_of(case: Case) -> dict[str, Tensor]:
    """The reference's, head by head, in float64."""
    whole = Whole.of(case, torch.float64)
    leaves = [leaf(x) for x in (whole.q_BLNH, *latents(case))]
    q_BLNH, latent_BLC, key_GCH, value_GCV = leaves
    options: dict[str, Any] = dict(whole.options) | {name: leaf(whole.options[name]) for name in whole.learned}
    keys = [torch.cat([latent_BLC[..., :WIDE] @ w, latent_BLC[..., WIDE:]], dim=-1) for w in key_GCH]
    values = [torch.tanh(latent_BLC[..., :WIDE] @ w) for w in value_GCV]
    out_BLNH = reference_attention(q_BLNH, torch.stack(keys, 2), torch.stack(values, 2), **options)
    out_BLNH.backward(whole.grad_BLNH)
    answer = dict(zip(NAMES, (out_BLNH.detach(), *map(grad_of, leaves)), strict=True))
    return answer | {f"d {name}": grad_of(options[name]) for name in whole.learned}


def differences(rank: int, each: SpreadCase, attend: Attend | None) -> dict[str, float]:
    """How far this rank's output and gradients, and the sums of those of weights and options, are from the
    reference."""
    case, wanted = each.case, latent_answer_of(each.case)
    whole = Whole.of(case, torch.float64)
    sharding, kv_sharding = each.shardings
    latent_BLC, *weights = latents(case)
    q_BlNH, latent_BlC = (
        leaf(cut_by_loops(whole.q_BLNH, sharding, rank)),
        leaf(cut_by_loops(latent_BLC, kv_sharding, rank)),
    )
    weights = [leaf(x) for x in weights]
    options: dict[str, Any] = dict(whole.options) | {name: leaf(whole.options[name]) for name in whole.learned}
    out_BlNH = latent_attention_over_ranks(
        q_BlNH,
        latent_BlC,
        expand=expand,
        weights=weights,
        kv_heads=case.num_heads[1],
        sharding=sharding,
        kv_sharding=kv_sharding if case.kind in CROSS else None,
        group=world(),
        scheme=each.scheme,
        heads=each.heads,
        attend=attend,
        **options,
    )
    out_BlNH.backward(cut_by_loops(whole.grad_BLNH, sharding, rank))
    got = {"out": out_BlNH.detach(), "dq": grad_of(q_BlNH), "dlatent": grad_of(latent_BlC)}
    of = {"out": sharding, "dq": sharding, "dlatent": kv_sharding}
    found = {name: difference(got[name], cut_by_loops(wanted[name], of[name], rank)) for name in got}
    learned: Sequence[tuple[str, Tensor]] = [
        *zip(NAMES[3:], weights, strict=True),
        *((f"d {name}", options[name]) for name in whole.learned),
    ]
    return found | {name: difference(sum_of(x), wanted[name]) for name, x in learned}
