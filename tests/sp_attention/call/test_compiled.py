"""torch.compile of a block with the exchange: the same outputs and gradients, over one length after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import heads_from_tokens, tokens_from_heads, ulysses_attention
from tests.support.compile import untraced
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE, difference, grad_of, leaf, share

Held = tuple[tuple[int, ...], ...]


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


@untraced()
def compiled(rank: int, name: str, seq: tuple[int, ...], sizes: tuple[int, ...], held: Held) -> list[str]:
    """What a compiled block computes otherwise, or which gradient of it is zero."""
    sharding, heads = TokenSharding(batch=2, seq=Partition(seq), held=held), Partition(sizes)

    def exchange(x_BlNH: Tensor) -> Tensor:
        x_BLnH = heads_from_tokens(x_BlNH, sharding=sharding, heads=heads, group=world())
        return tokens_from_heads(torch.tanh(x_BLnH) * 2, sharding=sharding, heads=heads, group=world())

    def attention(x_BlNH: Tensor) -> Tensor:
        kv = x_BlNH[:, :, :2], x_BlNH[:, :, 2:] * 2
        return ulysses_attention(x_BlNH, *kv, sharding=sharding, group=world(), heads=heads, is_causal=True)

    torch.manual_seed(5)
    block = Block({"exchange": exchange, "attention": attention}[name], 4, 6)
    x_BlD = sharding.shard(torch.randn(2, sum(seq), 5, dtype=torch.float64), rank)

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
    if sharding.local_sizes[rank]:
        failures += [f"{key} is zero" for key in got if not got[key].any()]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return failures + [f"{graphs} graphs"] * (graphs != 1)


LENGTHS = [(3, 2), (4, 3), (0, 6)]
OVER_LENGTHS = [
    ("causal", False, LENGTHS[:2]),  # each compiles anew, and the block above has an empty shard
    pytest.param("other numbers", None, LENGTHS[::2], marks=pytest.mark.sweep),
    ("documents", None, LENGTHS),
    pytest.param("other numbers", None, LENGTHS, marks=pytest.mark.sweep),
]


def options_of(name: str, batch: int, length: int) -> dict[str, Any]:
    """Of a call on sequences of ``length``; of "other numbers", each is another in every call."""
    keep_BL = torch.arange(length).expand(batch, length) != 1
    cu_seqlens = torch.tensor([0, 2, length - 1])
    return {
        "causal": {"is_causal": True},
        "other numbers": {
            "scale": length / 8,
            "window": (length // 2, 0),
            "dropout_p": length / 100,
            "key_padding_mask": keep_BL,
            "sinks_N": torch.ones(4, dtype=torch.float64),
        },
        "documents": {"cu_seqlens": cu_seqlens, "cu_seqlens_padded": torch.tensor([0, 3, length])},
    }[name]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = (nn.Linear(*sizes, dtype=torch.float64) for sizes in ((5, 24), (24, 5)))

    def forward(self, x_BlD: Tensor, sharding: TokenSharding, options: dict[str, Any]) -> Tensor:
        q_BlNH = self.before(x_BlD).unflatten(-1, (4, -1))
        kv = q_BlNH[:, :, :2], q_BlNH[:, :, 2:] * 2
        return self.after(ulysses_attention(q_BlNH, *kv, sharding=sharding, group=world(), **options).flatten(2))


@untraced()
def over_lengths(rank: int, name: str, dynamic: bool | None, lengths: list[tuple[int, int]]) -> list[str]:
    """What one compiled block computes otherwise."""
    torch._dynamo.reset()
    batch = 1 if name == "documents" else 2
    torch.manual_seed(5)
    block = SelfAttention()
    compiled = torch.compile(block, fullgraph=name != "documents", backend="aot_eager", dynamic=dynamic)
    failures = []
    for seq in lengths:
        sharding = TokenSharding(batch=batch, seq=Partition(seq))
        options = options_of(name, batch, sum(seq))
        x_BlD = share(torch.randn(batch, sum(seq), 5, dtype=torch.float64), seq, "BL", rank)
        answers = []
        for run in (block, compiled):
            block.zero_grad()
            mine_BlD = leaf(x_BlD)
            torch.manual_seed(7)
            out_BlD = run(mine_BlD, sharding, options)
            out_BlD.square().sum().backward()
            answers.append([out_BlD.detach(), grad_of(mine_BlD), *(grad_of(x).clone() for x in block.parameters())])
        failures += [f"{seq}" for a, b in zip(*answers, strict=True) if not difference(b, a) <= TOLERANCE]
        failures += [f"{seq} zero"] * (seq[rank] > 0 and not all(bool(x.any()) for x in answers[1]))
    return failures


@untraced()
def documents_in_one_graph(rank: int) -> str:
    """What is told."""
    torch._dynamo.reset()
    sharding = TokenSharding(batch=1, seq=Partition((3, 2)))
    x_BlD = torch.randn(1, (3, 2)[rank], 5, dtype=torch.float64)
    with pytest.raises(Unsupported) as error:
        torch.compile(SelfAttention(), fullgraph=True)(x_BlD, sharding, options_of("documents", 1, 5))
    return str(error.value)


def another_dtype(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    return q_BLnH.float()


WRONG: dict[str, dict[str, Any]] = {
    "a mask": {"attn_mask": torch.ones(3, 3, dtype=torch.bool)},
    "another option": {"is_causal": True},
    "an attend": {"attend": another_dtype},
}


@untraced()
def wrong_on_rank_1(rank: int, name: str) -> tuple[str, float]:
    """What this rank's graph raises when it runs, and the sum over the group after it."""
    torch._dynamo.reset()
    sharding, options = TokenSharding(batch=2, seq=Partition((3, 2))), WRONG[name] if rank == 1 else {}
    x_BlNH = torch.ones(2, (3, 2)[rank], 4, 6, dtype=torch.float64)

    def attention(x_BlNH: Tensor) -> Tensor:
        return ulysses_attention(x_BlNH, x_BlNH, x_BlNH, sharding=sharding, group=world(), **options)

    with pytest.raises(RuntimeError) as error:
        torch.compile(attention, fullgraph=True, backend="aot_eager")(x_BlNH)
    total = torch.ones(())
    dist.all_reduce(total)
    return str(error.value), total.item()


@untraced()
def in_autocast(rank: int) -> tuple[torch.dtype, bool]:
    torch._dynamo.reset()
    sharding = TokenSharding(batch=2, seq=Partition((3, 2)))
    x_BlNH = torch.randn(2, (3, 2)[rank], 4, 6)

    def attention(x_BlNH: Tensor) -> Tensor:
        sinks_N = torch.ones(4)
        return ulysses_attention(x_BlNH, x_BlNH, x_BlNH, sharding=sharding, group=world(), sinks_N=sinks_N)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = attention(x_BlNH)
        got = torch.compile(attention, fullgraph=True, backend="aot_eager")(x_BlNH)
    return got.dtype, torch.equal(got, wanted)


SHARES = [
    ("exchange", (3, 4), (4, 0), ((0,), (1,))),
    ("attention", (3, 4), (3, 1), ((0,), (1,))),
    ("attention", (0, 5), (2, 2), ((0,), (1,))),
    ("attention", (2, 1, 2, 1), (3, 1), ((0, 3), (2, 1))),
    *(
        pytest.param(*shares, ((0,), (1,)), marks=pytest.mark.sweep)
        for shares in [
            ("exchange", (3, 4), (3, 1)),
            ("exchange", (0, 5), (2, 2)),
            ("attention", (3, 4), (4, 0)),
        ]
    ),
]


@pytest.mark.parametrize(("name", "seq", "heads", "held"), SHARES)
def test_a_compiled_block_has_the_same_gradients(
    rank_pool: RankPool, name: str, seq: tuple[int, ...], heads: tuple[int, ...], held: Held
) -> None:
    """Invariant 9, B6, B18: what is before the exchange has gradients, and they are not 0."""
    assert rank_pool.run(compiled, 2, name, seq, heads, held, timeout=120) == [[]] * 2


@pytest.mark.parametrize(("name", "dynamic", "lengths"), OVER_LENGTHS)
def test_one_compiled_block_takes_one_length_after_the_other(
    rank_pool: RankPool, name: str, dynamic: bool | None, lengths: list[tuple[int, int]]
) -> None:
    """With ``dynamic`` left alone, torch makes the second length a symbol; documents are a graph break."""
    assert rank_pool.run(over_lengths, 2, name, dynamic, lengths, timeout=120) == [[]] * 2


def test_documents_are_no_part_of_a_graph(rank_pool: RankPool) -> None:
    for text in rank_pool.run(documents_in_one_graph, 2, timeout=120):
        assert "cu_seqlens are read: each batch of documents would be another graph" in text


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "an attend" else pytest.mark.sweep) for name in WRONG]
)
def test_compiled_code_raises_on_every_rank_when_it_runs(rank_pool: RankPool, name: str) -> None:
    text = "sp_attention: the ranks disagree, or one has a problem"
    assert rank_pool.run(wrong_on_rank_1, 2, name, timeout=120) == [(text, 2.0)] * 2


def test_a_compiled_call_in_autocast(rank_pool: RankPool) -> None:
    assert rank_pool.run(in_autocast, 2, timeout=120) == [(torch.bfloat16, True)] * 2
