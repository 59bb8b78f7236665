"""torch.func around an exchange is refused by a sentence, on every rank, before anything is sent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import exchange_rows
from moe_dispatch.testing import RankThreads
from sp_attention import Scheme, attention_over_ranks, scaled_dot_product, ulysses_attention
from tests.support.dispatch.moe import DIM, Case
from tests.support.ranks import world
from tests.support.tensors import leaf

CASE = Case(seq=(3, 0, 2), experts=(2, 1, 2))
TEXT = (
    "an exchange between ranks inside of a torch.func transform (grad, vmap, jvp), or of a batched backward; use "
    "loss.backward() or torch.autograd.grad, one at a time"
)

SCHEMES: dict[str, dict[str, Any]] = {
    "gathered keys": {"scheme": Scheme.gather(keep=True)},
    "ring keys": {"scheme": Scheme.ring(chunk=2)},
    "chunks for shared heads": {"scheme": Scheme.ulysses(chunk=2)},
    "gathered keys for an attend": {"scheme": Scheme.gather(), "attend": scaled_dot_product},
    "shared heads for an attend": {"scheme": Scheme.ulysses(keep=False), "attend": scaled_dot_product},
}


def called(what: str, rank: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A function of a tensor, and one to call it with."""
    if what == "exchange_rows":
        return lambda x: exchange_rows(x, (1, 1, 1), (1, 1, 1), world()), torch.randn(3, 2)
    shape = CASE.sharding.local_shape(rank)
    if what == "attention":
        x_BlNH = torch.randn(*shape, 3, 4)
        return lambda x: ulysses_attention(x, x, x, sharding=CASE.sharding, group=world()), x_BlNH
    if what in SCHEMES:
        x_BlNH, options = torch.randn(*shape, 3, 4), SCHEMES[what]
        return lambda x: attention_over_ranks(x, x, x, sharding=CASE.sharding, group=world(), **options), x_BlNH
    moe = CASE.layer(rank)
    return lambda x: moe(x, sharding=CASE.sharding)[0], torch.randn(*shape, DIM, dtype=torch.float64)


def in_backward(call: Callable[[Tensor], Tensor], x: Tensor) -> object:
    """Of two gradients at once, as torch.autograd.functional.jacobian(vectorize=True) takes them."""
    x = leaf(x)
    y = call(x)
    return torch.autograd.grad(y, x, torch.stack([y, y]), is_grads_batched=True)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda call, x: torch.func.grad(lambda x: call(x).sum())(x),
    "vmap": lambda call, x: torch.func.vmap(call)(torch.stack([x, x])),
    "backward": in_backward,
}


def refused(rank: int, what: str, transform: str) -> str:
    call, x = called(what, rank)
    with pytest.raises(RuntimeError) as error:
        TRANSFORMS[transform](call, x)
    assert call(x).shape[-1] == x.shape[-1]  # the group is usable
    return str(error.value)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("what", ["MoE", "attention", "exchange_rows", *SCHEMES])
def test_a_transform_is_refused_on_every_rank(rank_threads: RankThreads, what: str, transform: str) -> None:
    """torch named operations of ours; in a batched backward of attention, ranks that are threads crashed."""
    assert rank_threads.run(refused, 3, what, transform) == [TEXT] * 3
