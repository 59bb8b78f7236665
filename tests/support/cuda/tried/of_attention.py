"""The operations of ``sp_attention``, in a case of any number of ranks that share four query heads and two of keys;
float64, so that what the CPU computes with other kernels is the same but for the last bits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from sp_attention import (
    Batch,
    Scheme,
    attention_over_ranks,
    count_targets,
    gather_outputs,
    heads_from_tokens,
    latent_attention_over_ranks,
    mean_cross_entropy,
    mean_loss,
    shard_batch,
    tokens_from_heads,
    ulysses_attention,
)
from tests.support.latent import TURNED, WIDE, expand
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE

from .of_experts import TOKENS, of_ranks
from .operation import Operation, Place, Step

ROWS, HEADS, KV_HEADS, WIDTH, VOCABULARY = 2, 4, 2, 8, 7


def tokens_of_ranks(rows: int = ROWS) -> TokenSharding:
    """A new object: it keeps what is made for it."""
    return TokenSharding(batch=rows, seq=of_ranks(TOKENS))


def length() -> int:
    return tokens_of_ranks().seq.total


def drawn(rank: int, *shape: int, rows: int = ROWS) -> Tensor:
    """(rows, l, *shape) of a rank's tokens, a leaf."""
    generator = torch.Generator().manual_seed(rank + 10 * len(shape))
    size = (*tokens_of_ranks(rows).local_shape(rank), *shape)
    return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()


def on_whole(*shape: int, seed: int = 3) -> Tensor:
    """The same on every rank, a leaf."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


Options = Callable[[Place], dict[str, Any]]
OPTIONS: dict[str, tuple[int, Options]] = {
    "causal": (ROWS, lambda place: {"is_causal": True}),
    "window": (ROWS, lambda place: {"window": (2, 1)}),
    "bool mask": (
        ROWS,
        lambda place: {"attn_mask": place.tensor(on_whole(ROWS, 1, length(), length()).detach() > -0.5)},
    ),
    "learned mask": (ROWS, lambda place: {"attn_mask": place.tensor(on_whole(1, HEADS, length(), length()))}),
    "padding": (ROWS, lambda place: {"key_padding_mask": place.tensor(_real()), "is_causal": True}),
    "documents": (1, lambda place: {"cu_seqlens": torch.tensor([0, 4, length()], device="cpu"), "is_causal": True}),
    "sinks": (ROWS, lambda place: {"sinks_N": place.tensor(on_whole(HEADS)), "is_causal": True}),
    "dropout": (ROWS, lambda place: {"dropout_p": 0.25, "is_causal": True}),
}
SCHEMES: dict[str, Callable[[int], Scheme]] = {
    "gather": lambda ranks: Scheme.gather(),
    "gather, kept": lambda ranks: Scheme.gather(keep=True),
    "ring": lambda ranks: Scheme.ring(),
    "teams of 2": lambda ranks: Scheme.two_dimensional(head_ranks=2 - ranks % 2),
    "teams of 2, ring": lambda ranks: Scheme.two_dimensional(head_ranks=2 - ranks % 2, keys="ring"),
    "Ulysses, chunks": lambda ranks: Scheme.ulysses(chunk=5),
    "gather, offload": lambda ranks: Scheme.gather(offload=True),
}


def _real() -> Tensor:
    real_BL = torch.ones(ROWS, length(), dtype=torch.bool, device="cpu")
    real_BL[1, length() // 2 :] = False
    return real_BL


def attending(
    attention: Callable[..., Tensor],
    rows: int,
    options: Options,
    rank: int,
    place: Place,
    dtype: torch.dtype = torch.float64,
) -> Step:
    q, k, v = (
        place.tensor(drawn(rank, heads, WIDTH, rows=rows).detach().to(dtype).requires_grad_())
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    given, sharding = options(place), tokens_of_ranks(rows)
    learned = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    return Step(lambda: [attention(q, k, v, sharding=sharding, group=world(), **given)], (q, k, v, *learned))


def attending_in_scheme(
    name: str, rank: int, place: Place, *, option: str = "causal", dtype: torch.dtype = torch.float64
) -> Step:
    attention = partial(attention_over_ranks, scheme=SCHEMES[name](world().size()))
    return attending(attention, *OPTIONS[option], rank, place, dtype)


def attending_by_latents(name: str, rank: int, place: Place) -> Step:
    sharding = tokens_of_ranks()
    q, latent = place.tensor(drawn(rank, HEADS, WIDTH)), place.tensor(drawn(rank, WIDE + TURNED))
    weights = (
        place.tensor(on_whole(HEADS, WIDE, WIDTH - TURNED)),
        place.tensor(on_whole(HEADS, WIDE, WIDTH, seed=4)),
    )
    given = {
        "expand": expand,
        "weights": weights,
        "scheme": SCHEMES[name](world().size()),
        "sharding": sharding,
        "is_causal": True,
    }
    return Step(lambda: [latent_attention_over_ranks(q, latent, group=world(), **given)], (q, latent, *weights))


def to_heads_and_back(rank: int, place: Place) -> Step:
    x, heads, sharding = (
        place.tensor(drawn(rank, HEADS, WIDTH)),
        Partition.balanced(HEADS, world().size()),
        tokens_of_ranks(),
    )

    def forward() -> Sequence[Tensor]:
        of_heads = heads_from_tokens(x, sharding=sharding, heads=heads, group=world())
        return [tokens_from_heads(of_heads * 2, sharding=sharding, heads=heads, group=world())]

    return Step(forward, (x,))


def batch_of(place: Place, *, padded: bool) -> Batch:
    token_BL = torch.arange(ROWS * length(), device="cpu").view(ROWS, length()) % VOCABULARY
    return Batch(token_BL=place.tensor(token_BL), attention_mask=place.tensor(_real()) if padded else None)


def cutting(rank: int, place: Place) -> Step:
    batch, sharding = batch_of(place, padded=True), tokens_of_ranks()

    def forward() -> Sequence[Tensor]:
        part = shard_batch(batch, sharding=sharding, group=world())
        return [part.token_Bl, part.target_Bl, part.position_Bl, part.real_Bl]

    return Step(forward)


def outputs(rank: int, place: Place) -> Step:
    part = shard_batch(batch_of(place, padded=True), sharding=tokens_of_ranks(), group=world())
    x = place.tensor(drawn(rank, WIDTH))
    return Step(lambda: [gather_outputs(x, batch=part, group=world())], (x,))


def losses(loss: Callable[..., Any], shape: tuple[int, ...], rank: int, place: Place) -> Step:
    part = shard_batch(batch_of(place, padded=True), sharding=tokens_of_ranks(), group=world())
    x = place.tensor(drawn(rank, *shape))

    def forward() -> Sequence[Tensor]:
        mean = loss(x, part.target_Bl, group=world())
        return [mean.share, mean.whole]

    return Step(forward, (x,))


def counting(rank: int, place: Place) -> Step:
    part = shard_batch(batch_of(place, padded=True), sharding=tokens_of_ranks(), group=world())

    def forward() -> Sequence[Tensor]:
        assert count_targets(part.target_Bl, group=world()) > 0
        return []

    return Step(forward)


OF_ATTENTION = (
    *(
        Operation(
            name=f"ulysses_attention, {name}",
            step=partial(attending, ulysses_attention, *given),
            tolerance=TOLERANCE,
        )
        for name, given in OPTIONS.items()
    ),
    *(
        Operation(
            name=f"attention_over_ranks, {name}",
            step=partial(attending_in_scheme, name),
            tolerance=TOLERANCE,
        )
        for name in SCHEMES
    ),
    Operation(
        name="attention_over_ranks, gather, padding, float32",
        step=partial(attending_in_scheme, "gather", option="padding", dtype=torch.float32),
        tolerance=1e-5,
    ),
    Operation(
        name="attention_over_ranks, ring, bfloat16",
        step=partial(attending_in_scheme, "ring", dtype=torch.bfloat16),
        tolerance=0.03,
    ),
    *(
        Operation(
            name=f"latent_attention_over_ranks, {name}",
            step=partial(attending_by_latents, name),
            tolerance=TOLERANCE,
        )
        for name in ("gather", "ring")
    ),
    Operation(name="heads_from_tokens, tokens_from_heads", step=to_heads_and_back),
    Operation(name="shard_batch", step=cutting, d2h=(8, 0)),
    Operation(name="gather_outputs", step=outputs, d2h=(1, 0)),
    Operation(name="count_targets", step=counting, d2h=(1, 0)),
    Operation(name="mean_loss", step=partial(losses, mean_loss, ()), d2h=(1, 0)),
    Operation(name="mean_cross_entropy", step=partial(losses, mean_cross_entropy, (VOCABULARY,)), d2h=(2, 0)),
)
