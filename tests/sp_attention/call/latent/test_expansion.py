"""What is expanded, where and when: this rank's heads, rows that somebody sees, a block of them at a time, under the
caller's autocast; and what a latent may hold where nobody looks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import Scheme, latent_attention_over_ranks, scaled_dot_product
from tests.support.latent import TURNED, WIDE, expand
from tests.support.live import LiveBytes
from tests.support.ranks import world
from tests.support.tensors import grad_of, leaf, same_bits

pytestmark = pytest.mark.usefixtures("uncovered")

SCHEMES = [Scheme.ulysses(), Scheme.gather(chunk=4), Scheme.two_dimensional(head_ranks=2, keys="ring")]
HEADS, WIDTH, V_WIDTH = 3, 6, 4  # one rank of four has no head in Ulysses


def wholes(batch: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Queries, latents and weights, the same on every rank."""
    draw = torch.Generator().manual_seed(5)
    shapes = (
        (batch, length, HEADS, WIDTH),
        (batch, length, WIDE + TURNED),
        (HEADS, WIDE, WIDTH - TURNED),
        (HEADS, WIDE, V_WIDTH),
    )
    q_BLNH, latent_BLC, *weights = (
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return q_BLNH, latent_BLC, weights


def call(
    rank: int, sharding: TokenSharding, whole: tuple[Tensor, Tensor, list[Tensor]], **options: Any
) -> list[Tensor]:
    """Output, and the gradients of q, the latent and the weights."""
    leaves = [leaf(sharding.shard(x, rank)) for x in whole[:2]]
    weights = [leaf(x) for x in whole[2]]
    arguments = {"expand": expand, "sharding": sharding, "group": world()} | options
    out_BlNH = latent_attention_over_ranks(*leaves, weights=weights, **arguments)
    out_BlNH.float().square().sum().backward()
    return [out_BlNH.detach(), *map(grad_of, (*leaves, *weights))]


# ---- what a latent may hold ----------------------------------------------------------------------------

DOCUMENTS = {"cu_seqlens": torch.tensor([0, 5, 11]), "cu_seqlens_padded": torch.tensor([1, 8, 17])}
PADDED = {
    "documents": (DOCUMENTS, [0, 6, 7, 14, 15, 16, 17, 18]),
    "key padding": ({"key_padding_mask": torch.arange(19)[None] >= 4}, [0, 1, 2, 3]),
}


def differs_with_nan(rank: int, name: str, scheme: Scheme, of_attend: bool) -> list[int]:
    """Which of output and gradients change with what latents hold at padding."""
    options, away = PADDED[name]
    sharding = TokenSharding(batch=1, seq=Partition((7, 0, 8, 4)))
    attend = scaled_dot_product if of_attend else None
    q_BLNH, latent_BLC, weights = wholes(1, 19)
    results = []
    for value in (0.5, torch.nan):
        filled_BLC = latent_BLC.index_fill(1, torch.tensor(away), value)
        whole = (q_BLNH, filled_BLC, weights)
        results.append(call(rank, sharding, whole, scheme=scheme, attend=attend, is_causal=True, **options))
    assert results[0][0].isfinite().all()
    return [i for i, (got, wanted) in enumerate(zip(*results, strict=True)) if not same_bits(got, wanted)]


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_nan_at_padding_reaches_nothing(rank_threads: RankThreads, name: str, scheme: Scheme) -> None:
    assert rank_threads.run(differs_with_nan, 4, name, scheme, False) == [[]] * 4


@pytest.mark.parametrize("name", PADDED)
def test_nor_with_an_attend_of_the_callers(rank_threads: RankThreads, name: str) -> None:
    assert rank_threads.run(differs_with_nan, 4, name, Scheme.gather(), True) == [[]] * 4


# ---- how much is expanded ------------------------------------------------------------------------------


def expanded_by(rank: int, scheme: Scheme) -> list[tuple[int, range]]:
    """Rows and heads of each expansion of a forward and a backward, after the trial, which is of a head at least."""
    seen: list[tuple[int, range]] = []

    def watched(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
        seen.append((latent_BLC.shape[1], heads))
        return expand(latent_BLC, *weights, heads=heads)

    sharding = TokenSharding(batch=2, seq=Partition((7, 0, 8, 4)))
    call(rank, sharding, wholes(2, 19), scheme=scheme, expand=watched, window=(2, 0))
    assert all(heads for _, heads in seen)
    return seen[1:]


def test_only_its_heads_and_rows_that_somebody_sees(rank_threads: RankThreads) -> None:
    ulysses = rank_threads.run(expanded_by, 4, Scheme.ulysses())
    assert ulysses == [[(19, range(head, head + 1))] * 2 for head in range(3)] + [[]]
    heads = range(3)
    own, others = [(4, heads), (3, heads)], [(2, heads)]
    assert rank_threads.run(expanded_by, 4, Scheme.gather(chunk=4)) == [
        own * 2,
        [],
        [(4, heads), (4, heads), *others] * 2,
        [(4, heads), *others] * 2,
    ]


def memory(rank: int, length: int) -> tuple[int, int]:
    """Bytes of forward beyond the output, and of backward."""
    sharding = TokenSharding.zigzag(batch=1, length=length, ranks=2)
    q_BLNH, latent_BLC, _ = wholes(1, length, torch.float32)
    leaves = [leaf(sharding.shard(x, rank)) for x in (q_BLNH, latent_BLC)]
    weights = [torch.randn(HEADS, WIDE + TURNED, 64, requires_grad=True) for _ in range(2)]

    def wide(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
        k_BLgH, v_BLgV = (torch.einsum("blc,gch->blgh", latent_BLC, x) for x in weights)
        return k_BLgH[..., :WIDTH], v_BLgV[..., :V_WIDTH]

    arguments: dict[str, Any] = {"sharding": sharding, "group": world(), "is_causal": True}
    with LiveBytes() as forward:
        out_BlNH = latent_attention_over_ranks(
            *leaves, expand=wide, weights=weights, scheme=Scheme.gather(chunk=32), **arguments
        )
    grad_BlNH = torch.ones_like(out_BlNH)
    with LiveBytes() as backward:
        out_BlNH.backward(grad_BlNH)
    return forward.most - out_BlNH.nbytes, backward.most - 2 * sum(x.nbytes for x in leaves)


def test_keys_exist_for_a_chunk_of_rows_only(rank_threads: RankThreads) -> None:
    """Keys and values of one token take 1536 bytes here, and its latent 28."""
    short, long = (rank_threads.run(memory, 2, length) for length in (256, 512))
    growth = [more - less for pair in zip(short, long, strict=True) for less, more in zip(*pair, strict=True)]
    assert max(growth) <= 128 * 150, (short, long)


# ---- around a call -------------------------------------------------------------------------------------


def in_low_precision(rank: int, scheme: Scheme, of_attend: bool) -> tuple[set[torch.dtype], list[float]]:
    """Autocast around float32, forward only, against float64."""
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 5, 4)))
    attend = scaled_dot_product if of_attend else None
    dtypes: set[torch.dtype] = set()

    def linear(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
        k_BLgH, v_BLgV = expand(latent_BLC, *weights, heads=heads)
        dtypes.update((k_BLgH.dtype, v_BLgV.dtype))
        return k_BLgH, v_BLgV

    wanted = call(rank, sharding, wholes(2, 12), scheme=scheme, attend=attend)
    leaves = [leaf(sharding.shard(x, rank)) for x in wholes(2, 12, torch.float32)[:2]]
    weights = [leaf(x) for x in wholes(2, 12, torch.float32)[2]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_BlNH = latent_attention_over_ranks(
            *leaves, expand=linear, weights=weights, sharding=sharding, group=world(), scheme=scheme, attend=attend
        )
    assert out_BlNH.dtype == torch.bfloat16
    out_BlNH.float().square().sum().backward()
    got = [out_BlNH.detach(), *map(grad_of, (*leaves, *weights))]
    assert [x.dtype for x in got[1:]] == [torch.float32] * 4
    pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if b.numel()]
    return dtypes, [((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs]


@pytest.mark.parametrize("of_attend", [False, True])
@pytest.mark.parametrize("scheme", [Scheme.ulysses(), Scheme.gather()], ids=str)
def test_autocast_reaches_expand_in_backward_too(rank_threads: RankThreads, scheme: Scheme, of_attend: bool) -> None:
    for dtypes, errors in rank_threads.run(in_low_precision, 4, scheme, of_attend):
        assert dtypes == {torch.bfloat16}
        assert max(errors) < 0.06


def in_checkpoint(rank: int, of_attend: bool) -> list[bool]:
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 5, 4)))
    q_BLNH, latent_BLC, weights = wholes(2, 12)
    attend = scaled_dot_product if of_attend else None
    results = []
    for recomputed in (False, True):
        leaves = [leaf(x) for x in (sharding.shard(q_BLNH, rank), sharding.shard(latent_BLC, rank), *weights)]

        def attention(q_BlNH: Tensor, latent_BlC: Tensor, *weights: Tensor) -> Tensor:
            return latent_attention_over_ranks(
                q_BlNH.sin(), latent_BlC.sin(), expand=expand, weights=[x.sin() for x in weights],
                sharding=sharding, group=world(), scheme=Scheme.gather(), attend=attend,
            )  # fmt: skip

        out_BlNH = checkpoint(attention, *leaves, use_reentrant=False) if recomputed else attention(*leaves)
        out_BlNH.square().sum().backward()
        results.append([out_BlNH.detach(), *map(grad_of, leaves)])
    return [same_bits(got, wanted) for got, wanted in zip(*results, strict=True)]


@pytest.mark.parametrize("of_attend", [False, True])
def test_in_a_checkpoint(rank_threads: RankThreads, of_attend: bool) -> None:
    assert rank_threads.run(in_checkpoint, 4, of_attend) == [[True] * 5] * 4


def packed(rank: int) -> list[int]:
    """How many tensors hooks of the caller's get, for an expand that saves few and for one that saves many."""
    counts = []

    def saving(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
        return expand(latent_BLC.sin().exp().cos(), *weights, heads=heads)

    for each in (expand, saving):
        seen: list[Tensor] = []

        def pack(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            call(rank, TokenSharding(batch=2, seq=Partition((5, 4))), wholes(2, 9), expand=each)
        counts.append(len(seen))
    return counts


def test_hooks_of_the_callers_get_nothing_of_an_expansion(rank_threads: RankThreads) -> None:
    """Offloading would copy the weights in each trial."""
    for few, many in rank_threads.run(packed, 2):
        assert few == many


def frozen(rank: int) -> list[bool]:
    """Which of q, the latent and two weights have a gradient, if the second weight and the latent want none."""
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 5, 4)))
    q_BLNH, latent_BLC, weights = wholes(2, 12)
    q_BlNH, latent_BlC = leaf(sharding.shard(q_BLNH, rank)), sharding.shard(latent_BLC, rank)
    weights[0].requires_grad_()
    out_BlNH = latent_attention_over_ranks(
        q_BlNH, latent_BlC, expand=expand, weights=weights, sharding=sharding, group=world()
    )
    out_BlNH.sum().backward()
    return [x.grad is not None for x in (q_BlNH, latent_BlC, *weights)]


def test_weights_that_want_no_gradient_get_none(rank_threads: RankThreads) -> None:
    """And those that do have one on every rank, also where there is no head."""
    assert rank_threads.run(frozen, 4) == [[True, False, True, False]] * 4
