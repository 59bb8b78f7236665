"""torch.compile of a block with the exchange: the same outputs and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import heads_from_tokens, tokens_from_heads, ulysses_attention

from .test_ulysses_attention import TOLERANCE, difference, grad_of, leaf, share, world

# ---- cases: what the ranks run -------------------------------------------------------------------------


class Block(nn.Module):
    """Linear layers around an exchange: their gradients are those that vanish when a collective leaves the graph."""

    def __init__(self, middle: Callable[[Tensor], Tensor], num_heads: int, width: int) -> None:
        super().__init__()
        self.before = nn.Linear(5, num_heads * width, dtype=torch.float64)
        self.after = nn.Linear(num_heads * width, 5, dtype=torch.float64)
        self.middle, self.num_heads = middle, num_heads

    def forward(self, x_BlD: Tensor) -> Tensor:
        x_BlNH = self.before(x_BlD).unflatten(-1, (self.num_heads, -1))
        return self.after(self.middle(x_BlNH).flatten(2))


def compiled(rank: int, name: str, seq: tuple[int, ...], sizes: tuple[int, ...]) -> list[str]:
    """What a compiled block computes otherwise, or which gradient of it is zero."""
    sharding, heads = TokenSharding(batch=2, seq=Partition(seq)), Partition(sizes)

    def exchange(x_BlNH: Tensor) -> Tensor:
        x_BLnH = heads_from_tokens(x_BlNH, sharding=sharding, heads=heads, group=world())
        return tokens_from_heads(torch.tanh(x_BLnH) * 2, sharding=sharding, heads=heads, group=world())

    def attention(x_BlNH: Tensor) -> Tensor:
        kv = x_BlNH[:, :, :2], x_BlNH[:, :, 2:] * 2
        return ulysses_attention(x_BlNH, *kv, sharding=sharding, group=world(), heads=heads, is_causal=True)

    torch.manual_seed(5)
    block = Block({"exchange": exchange, "attention": attention}[name], 4, 6)
    x_BlD = share(torch.randn(2, sum(seq), 5, dtype=torch.float64), seq, "BL", rank)

    def answer(run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        block.zero_grad()
        mine_BlD = leaf(x_BlD)
        out_BlD = run(mine_BlD)
        out_BlD.square().sum().backward()
        grads = {name: grad_of(weight).clone() for name, weight in block.named_parameters()}
        return {"out": out_BlD.detach(), "x": grad_of(mine_BlD), **grads}

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wanted = answer(block)
    got = answer(torch.compile(block, fullgraph=True, backend="aot_eager"))
    failures = [key for key in wanted if not difference(got[key], wanted[key]) <= TOLERANCE]
    if seq[rank]:
        failures += [f"{key} is zero" for key in got if not got[key].any()]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return failures + [f"{graphs} graphs"] * (graphs != 1)


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize(("seq", "heads"), [((3, 4), (3, 1)), ((0, 5), (2, 2)), ((3, 4), (4, 0))])
@pytest.mark.parametrize("name", ["exchange", "attention"])
def test_a_compiled_block_has_the_same_gradients(
    rank_pool: RankPool, name: str, seq: tuple[int, ...], heads: tuple[int, ...]
) -> None:
    assert rank_pool.run(compiled, 2, name, seq, heads, timeout=120) == [[]] * 2
