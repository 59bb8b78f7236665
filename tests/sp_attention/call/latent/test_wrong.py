"""What one rank has wrong about a latent is told to all, before anything of it travels; the group works after."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import Scheme, latent_attention_over_ranks
from tests.support.attention.wrong_calls import works
from tests.support.latent import expand
from tests.support.ranks import refusal, world

Arguments = dict[str, Any]
GAVE = (
    "expand gave {} for latents (2, 2, 7) and heads range(2, 4); it has to give keys (2, 2, 2, 6) and values (B, L, "
    "heads, any width) of torch.float32"
)
STRANGE = (
    "expand uses a tensor {} that wants a gradient and is none of its arguments, so that its gradient would be lost; "
    "pass it in weights, and use it from there"
)


def right_call(rank: int) -> Arguments:
    """Two ranks with 3 and 4 tokens of 2 rows, 4 heads, widths 6 and 4, latents of 7."""
    sharding = TokenSharding(batch=2, seq=Partition((3, 4)))
    local = sharding.local_shape(rank)
    return {
        "q_BlNH": torch.randn(*local, 4, 6, requires_grad=True),
        "latent_BlC": torch.randn(*local, 7, requires_grad=True),
        "expand": expand,
        "weights": (torch.randn(4, 5, 4, requires_grad=True), torch.randn(4, 5, 4, requires_grad=True)),
        "sharding": sharding,
        "group": world(),
    }


def call(arguments: Arguments) -> Tensor:
    return latent_attention_over_ranks(**arguments)


def raises(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
    raise KeyError(heads.stop)


def of_all_heads(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
    return expand(latent_BLC, *weights, heads=range(4))


def in_double(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
    k_BLgH, v_BLgV = expand(latent_BLC, *weights, heads=heads)
    return k_BLgH, v_BLgV.double()


def keys_only(latent_BLC: Tensor, *weights: Tensor, heads: range) -> Tensor:
    return expand(latent_BLC, *weights, heads=heads)[0]


def with_tensor_of(weight: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    def closure(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
        k_BLgH, v_BLgV = expand(latent_BLC, *weights, heads=heads)
        return k_BLgH, v_BLgV * weight.exp()

    return closure


def writes(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        weights[0].mul_(2)
    return expand(latent_BLC, *weights, heads=heads)


WRONG: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "no expand": (
        lambda a: {"expand": None},
        "expand is None; a latent needs a function expand(latent_BLC, *weights, heads) that gives the keys and "
        "values of these heads",
    ),
    "expand raises": (lambda a: {"expand": raises}, "expand raised KeyError: 4"),
    "all heads": (
        lambda a: {"expand": of_all_heads},
        GAVE.format("(2, 2, 4, 6) of torch.float32 and (2, 2, 4, 4) of torch.float32"),
    ),
    "another dtype": (
        lambda a: {"expand": in_double},
        GAVE.format("(2, 2, 2, 6) of torch.float32 and (2, 2, 2, 4) of torch.float64"),
    ),
    "keys of another width": (
        lambda a: {"weights": (a["weights"][0][..., :1], a["weights"][1])},
        GAVE.format("(2, 2, 2, 3) of torch.float32 and (2, 2, 2, 4) of torch.float32"),
    ),
    "one that writes": (
        lambda a: {"expand": writes},
        "expand writes to its arguments, which are the caller's, and expanded again; write to copies",
    ),
    "one tensor": (lambda a: {"expand": keys_only}, GAVE.format("Tensor")),
    "a parameter of its own": (
        lambda a: {"expand": with_tensor_of(nn.Parameter(torch.ones(())))},
        STRANGE.format("()"),
    ),
    "a weight by another way": (
        lambda a: {"expand": with_tensor_of(a["weights"][0].sum())},
        STRANGE.format((4, 5, 4)),
    ),
    "one weight": (lambda a: {"weights": a["weights"][0]}, "weights is Tensor; it has to be a tuple of tensors"),
    "a weight elsewhere": (
        lambda a: {"weights": (a["weights"][0].detach().to("meta"), a["weights"][1])},
        "weights[0] is on meta, but q, the latent on cpu; move it there",
    ),
    "no head": (
        lambda a: {"kv_heads": 0},
        "kv_heads is 0; it is how many key/value heads there are, an int of at least 1",
    ),
    "heads in no groups": (
        lambda a: {"kv_heads": 3},
        "4 query heads over 3 key/value heads; each key/value head serves the same number of query heads, so their "
        "number has to divide that of the query heads",
    ),
    "heads as in keys": (
        lambda a: {"latent_BlC": a["latent_BlC"].unsqueeze(2)},
        "the latent is (2, 4, 1, 7); it has to be (B, l, width), or sequence first, and as wide as at least 1",
    ),
    "a token short": (
        lambda a: {"latent_BlC": a["latent_BlC"][:, 1:]},
        "the latent is (2, 3, 7), but this rank's shard in order 'BL' is (2, 4, 7); pass the tokens that the "
        "sharding gives this rank",
    ),
    "a latent of another dtype": (
        lambda a: {"latent_BlC": a["latent_BlC"].double()},
        "q, the latent are torch.float32, torch.float64; cast them to one floating-point dtype",
    ),
}


def told_and_works(rank: int, name: str) -> tuple[str, bool]:
    arguments = right_call(rank)
    change = WRONG[name][0](arguments) if rank == 1 else {}
    return refusal(lambda: call(arguments | change)), works(rank)


@pytest.mark.parametrize("name", WRONG)
def test_on_one_rank(rank_threads: RankThreads, name: str) -> None:
    told = rank_threads.run(told_and_works, 2, name)
    assert told == [(f"rank 1: {WRONG[name][1]}", True)] * 2


def disagree(rank: int, change: Callable[[Arguments], Arguments]) -> str:
    arguments = right_call(rank)
    return refusal(lambda: call(arguments | (change(arguments) if rank == 1 else {})))


def narrow(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
    k_BLgH, v_BLgV = expand(latent_BLC, *weights, heads=heads)
    return k_BLgH, v_BLgV[..., 1:]


@pytest.mark.parametrize(
    ("change", "mine", "others"),
    [
        (lambda a: {"latent_BlC": a["latent_BlC"].repeat(1, 1, 2)[..., :8], "expand": first_seven}, "of 8", "of 7"),
        (lambda a: {"expand": narrow}, "widths (6, 3)", "widths (6, 4)"),
        (lambda a: {"weights": [x.detach() for x in a["weights"]]}, "of weights False", "of weights True"),
        (lambda a: {"kv_heads": 4, "scheme": Scheme.gather()}, "keys gather", "keys gather, kept"),
    ],
)
def test_ranks_that_mean_other_latents(
    rank_threads: RankThreads, change: Callable[[Arguments], Arguments], mine: str, others: str
) -> None:
    told = rank_threads.run(disagree, 2, change)
    assert told[0] == told[1]
    assert mine in told[0]
    assert others in told[0]


def first_seven(latent_BLC: Tensor, *weights: Tensor, heads: range) -> tuple[Tensor, Tensor]:
    return expand(latent_BLC[..., :7], *weights, heads=heads)


def without_gradients(rank: int) -> tuple[int, ...]:
    arguments = right_call(rank) | {"expand": with_tensor_of(nn.Parameter(torch.ones(())))}
    with torch.no_grad():
        return tuple(call(arguments).shape)


def test_without_gradients_none_is_lost(rank_threads: RankThreads) -> None:
    assert rank_threads.run(without_gradients, 2) == [(2, 3, 4, 4), (2, 4, 4, 4)]
