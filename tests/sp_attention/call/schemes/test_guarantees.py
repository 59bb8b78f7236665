"""What holds whatever the scheme: padding is nothing, dropout has one pattern, and bits depend on no timing."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool, RankThreads
from sp_attention import Scheme, attention_over_ranks, scaled_dot_product
from sp_attention.reference import reference_attention
from sp_attention.work.plan import RankWork
from tests.support.attention.packed import documents, tensors
from tests.support.ranks import world
from tests.support.schemes import takes_attend
from tests.support.tensors import TOLERANCE, difference, grad_of, leaf, same_bits

pytestmark = pytest.mark.usefixtures("uncovered")

RANKS = 4
FOUR = {
    "gather": Scheme.gather(),
    "ring": Scheme.ring(keep=True, chunk=4),
    "two-dimensional, gather": Scheme.two_dimensional(head_ranks=2, keep=True),
    "two-dimensional, ring": Scheme.two_dimensional(head_ranks=2, keys="ring", offload=True),
    "Ulysses, bounded": Scheme.ulysses(chunk=9),
    "Ulysses": Scheme.ulysses(),
}
NAMES = ("out", "dq", "dk", "dv")
# Documents (real tokens, slots), padding before the first, inside each, and after the last: 28 tokens.
PACKED = documents([5, 0, 1, 7, 0, 1], [6, 2, 1, 9, 0, 3], 3)
REAL = [*range(3, 8), 11, *range(12, 19), 21]
LENGTH = 28


def shardings() -> dict[str, TokenSharding]:
    """In the second rank 1 has no token, and the others have theirs in any order."""
    runs = [[(20, 28), (0, 2)], [], [(9, 20)], [(5, 9), (2, 5)]]
    return {
        "zigzag": TokenSharding.zigzag(batch=1, length=LENGTH, ranks=RANKS),
        "any": TokenSharding.of_runs(batch=1, length=LENGTH, runs=runs),
    }


def attended(sharding: TokenSharding, wholes: list[Tensor], **options: Any) -> list[Tensor]:
    """This rank's out, dq, dk, dv, of whole q, k, v and the gradient."""
    rank = world().rank()
    *leaves, grad_BlNH = (leaf(sharding.shard(x, rank)) for x in wholes)
    out_BlNH = attention_over_ranks(*leaves, sharding=sharding, group=world(), **options)
    out_BlNH.backward(grad_BlNH.detach())
    return [out_BlNH.detach(), *map(grad_of, leaves)]


def different(got: list[Tensor], wanted: list[Tensor]) -> list[str]:
    return [name for name, a, b in zip(NAMES, got, wanted, strict=True) if not same_bits(a, b)]


def wrong(got: list[Tensor], wanted: list[Tensor]) -> list[str]:
    return [name for name, a, b in zip(NAMES, got, wanted, strict=True) if not difference(a, b) <= TOLERANCE]


def of_reference(wholes: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [leaf(x) for x in wholes[:3]]
    out_BLNH = reference_attention(*leaves, **options)
    out_BLNH.backward(wholes[3])
    return [out_BLNH.detach(), *map(grad_of, leaves)]


# ---- cases: what the ranks run -------------------------------------------------------------------------


def pad_between_seqs(rank: int, scheme: Scheme, fill: float, dtype: torch.dtype) -> list[str]:
    """What padding between documents changes, and where it is not exactly 0."""
    away_L = torch.ones(LENGTH, dtype=torch.bool).index_fill(0, torch.tensor(REAL), False)
    clean = [x.masked_fill(away_L[None, :, None, None], 0.0) for x in tensors(LENGTH, dtype=dtype)]
    dirty = [x.masked_fill(away_L[None, :, None, None], fill) for x in clean]
    failures = []
    attends = [{}, {"attend": scaled_dot_product}] if takes_attend(scheme) else [{}]
    for (name, sharding), attend in ((each, attend) for each in shardings().items() for attend in attends):
        options: dict[str, Any] = {"scheme": scheme, "is_causal": True, **PACKED, **attend}
        wanted, got = (attended(sharding, wholes, **options) for wholes in (clean, dirty))
        away_l = sharding.shard(away_L[None], rank)[0]
        failures += [f"{each}, {name}" for each in different(got, wanted)]
        failures += [f"{each} at padding, {name}" for each, x in zip(NAMES, got, strict=True) if x[:, away_l].any()]
        if dtype == torch.float64:
            whole = of_reference(clean, is_causal=True, **PACKED)
            failures += [
                f"{each} of real tokens, {name}" for each in wrong(got, [sharding.shard(x, rank) for x in whole])
            ]
    return failures


def pairs_of_plan(rank: int, scheme: Scheme, options: dict[str, Any]) -> tuple[set[tuple[int, int]], set[int]]:
    """(query, key) that the plan of a call has this rank compute, and the keys that came to it."""
    sharding = shardings()["any"]
    attended(sharding, tensors(LENGTH), scheme=scheme, **options)
    kept: dict[Any, RankWork] = sharding.keep(("work over ranks", rank), dict)
    (work,) = kept.values()
    pairs = {
        (piece.q_place + i, piece.k_place + j)
        for of_queries in work.pieces
        for of_keys in of_queries
        for piece in of_keys
        for i in range(piece.queries)
        for j in range(piece.keys)
        if piece.low <= j - i <= piece.high
    }
    return pairs, {key for turn in work.key_turns for runs in turn.came for run in runs for key in range(*run)}


def key_padding(rank: int, scheme: Scheme, fill: float) -> list[str]:
    """What key padding changes, beside the output of a query there. The second row has no key: its output is 0."""
    keep_BL = torch.stack([torch.arange(LENGTH) % 3 > 0, torch.zeros(LENGTH, dtype=torch.bool)])
    draw = torch.Generator().manual_seed(3)
    shapes = ((4, 6), (2, 6), (2, 4), (4, 4))
    *qkv, grad = (torch.randn(2, LENGTH, *shape, generator=draw, dtype=torch.float64) for shape in shapes)
    grad, failures = grad * keep_BL[..., None, None], list[str]()
    options: dict[str, Any] = {"scheme": scheme, "key_padding_mask": keep_BL, "window": (9, 4)}
    for name, uncut in shardings().items():
        sharding = uncut.with_batch(2)
        clean, dirty = ([x.masked_fill(~keep_BL[..., None, None], value) for x in qkv] for value in (0.0, fill))
        wanted, got = (attended(sharding, [*each, grad], **options) for each in (clean, dirty))
        failures += [f"no key, {name}"] * bool(got[0][1].any())
        keep_Bl = sharding.shard(keep_BL, rank)
        got[0], wanted[0] = got[0][keep_Bl], wanted[0][keep_Bl]
        failures += [f"{each}, {name}" for each in different(got, wanted)]
    return failures


def learned_and_dropped(rank: int, scheme: Scheme, keep_BNLL: Tensor) -> list[str]:
    """What differs from one rank, given which weights stay: dropout, sinks and a mask that learn, a window."""
    wholes = tensors(LENGTH)
    draw = torch.Generator().manual_seed(4)
    learned = [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((4,), (4, LENGTH, LENGTH))]
    failures = []
    whole: dict[str, Any] = dict(zip(("sinks_N", "attn_mask"), map(leaf, learned), strict=True))
    wanted = of_reference(wholes, window=(11, 2), keep_BNLL=keep_BNLL, dropout_p=0.4, **whole)
    for name, sharding in shardings().items():
        mine: dict[str, Any] = dict(zip(("sinks_N", "attn_mask"), map(leaf, learned), strict=True))
        torch.manual_seed(5 + 1000 * rank)  # only the first rank's counts
        got = attended(sharding, wholes, scheme=scheme, window=(11, 2), dropout_p=0.4, **mine)
        failures += [f"{each}, {name}" for each in wrong(got, [sharding.shard(x, rank) for x in wanted])]
        for option, x in mine.items():
            dist.all_reduce(grad_of(x))
            failures += [f"{option}, {name}"] * (not difference(grad_of(x), grad_of(whole[option])) <= TOLERANCE)
    return failures


def weights_that_stay() -> Tensor:
    """(1, N, L, L) of one rank, by the seed above: scores are equal and values unit vectors."""
    zeros_BLNH = torch.zeros(1, LENGTH, 4, 2, dtype=torch.float64)
    units_BLNH = torch.eye(LENGTH, dtype=torch.float64)[None, :, None].expand(1, -1, 4, -1)
    sharding = TokenSharding(batch=1, seq=Partition((LENGTH,)))
    torch.manual_seed(5)
    out_BLNH = attention_over_ranks(
        zeros_BLNH, zeros_BLNH, units_BLNH, sharding=sharding, group=world(), dropout_p=0.4
    )
    return out_BLNH.transpose(1, 2) > 0


def in_low_precision(rank: int, dtype: torch.dtype) -> list[str]:
    """What autocast gives other than a cast before: outputs in its dtype, and the same bits."""
    wholes, failures = tensors(LENGTH, dtype=torch.float32), list[str]()
    sinks_N, sharding = torch.linspace(-1, 1, 4), shardings()["any"]
    grad = wholes[3].to(dtype)
    for name, scheme in FOUR.items():
        options: dict[str, Any] = {"scheme": scheme, "sinks_N": sinks_N, "is_causal": True, "dropout_p": 0.3}
        torch.manual_seed(0)
        cast = attended(sharding, [*(x.to(dtype) for x in wholes[:3]), grad], **options)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype):
            *leaves, grad_BlNH = (leaf(sharding.shard(x, rank)) for x in (*wholes[:3], grad))
            out_BlNH = attention_over_ranks(*leaves, sharding=sharding, group=world(), **options)
        out_BlNH.backward(grad_BlNH.detach())
        got = [out_BlNH.detach(), *(grad_of(x).to(dtype) for x in leaves)]
        failures += [f"{each}, {name}" for each in different(got, cast)]
    return failures


def every_bit(rank: int) -> list[list[Tensor]]:
    """Of every scheme, with sums over ranks in backward."""
    wholes, sharding = tensors(LENGTH, dtype=torch.float32), shardings()["any"]
    return [attended(sharding, wholes, scheme=scheme, is_causal=True) for scheme in FOUR.values()]


def without_heads(rank: int) -> list[tuple[int, ...]]:
    """The heads and width of each output, if all gradients are 0."""
    sharding, wholes = shardings()["any"], tensors(LENGTH)
    wholes = [x[:, :, :0] if i in (0, 3) else x for i, x in enumerate(wholes)]
    found = [attended(sharding, wholes, scheme=scheme, is_causal=True) for scheme in FOUR.values()]
    return [tuple(out.shape[2:]) for out, *grads in found if not any(bool(grad.any()) for grad in grads)]


def in_a_part_of_the_ranks(rank: int) -> list[str]:
    """What differs from the reference in a group of ranks 0 and 3, while 1 and 2 have another."""
    groups = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    group = groups[rank in (1, 2)]
    assert isinstance(group, dist.ProcessGroup)
    sharding = TokenSharding.of_runs(batch=1, length=LENGTH, runs=[[(9, 28)], [(3, 9), (0, 3)]])
    wholes, failures = tensors(LENGTH), list[str]()
    wanted = of_reference(wholes, is_causal=True)
    for name, scheme in FOUR.items():
        *leaves, grad_BlNH = (leaf(sharding.shard(x, group.rank())) for x in wholes)
        out_BlNH = attention_over_ranks(*leaves, sharding=sharding, group=group, scheme=scheme, is_causal=True)
        out_BlNH.backward(grad_BlNH.detach())
        got = [out_BlNH.detach(), *map(grad_of, leaves)]
        failures += [f"{each}, {name}" for each in wrong(got, [sharding.shard(x, group.rank()) for x in wanted])]
    return failures


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize(("fill", "dtype"), [(float("nan"), torch.float64), (-float("inf"), torch.bfloat16)])
@pytest.mark.parametrize("name", FOUR)
def test_pad_between_seqs(rank_threads: RankThreads, name: str, fill: float, dtype: torch.dtype) -> None:
    """Invariant 3, in every scheme: of q, k, v and of the gradient of the output. TransformerEngine drops the option
    in one of its schemes."""
    assert rank_threads.run(pad_between_seqs, RANKS, FOUR[name], fill, dtype) == [[]] * RANKS


@pytest.mark.parametrize("name", [name for name in FOUR if name != "Ulysses"])
def test_pad_between_seqs_reaches_the_plan(rank_threads: RankThreads, name: str) -> None:
    """All pairs of real tokens of a document are computed, no other, and no padding is sent as a key. Ulysses sends
    whole sequences."""
    spans = [
        (start, start + n) for start, n in zip(PACKED["cu_seqlens_padded"], PACKED["cu_seqlens"].diff(), strict=False)
    ]
    wanted = {(i, j) for start, end in spans for i in range(start, end) for j in range(start, end)}
    for options, of in (({}, {(i, j) for i in range(LENGTH) for j in range(LENGTH)}), (PACKED, wanted)):
        found = rank_threads.run(pairs_of_plan, RANKS, FOUR[name], options)
        assert set().union(*(pairs for pairs, _ in found)) == of
        assert set().union(*(keys for _, keys in found)) <= {j for _, j in of}


@pytest.mark.parametrize("name", FOUR)
def test_key_padding_may_hold_anything(rank_threads: RankThreads, name: str) -> None:
    """Invariant 3."""
    assert rank_threads.run(key_padding, RANKS, FOUR[name], float("nan")) == [[]] * RANKS


@pytest.mark.parametrize("name", FOUR)
def test_dropout_and_what_is_learned(rank_threads: RankThreads, name: str) -> None:
    """One pattern in every scheme and order of tokens."""
    (keep_BNLL,) = rank_threads.run(weights_that_stay, 1)
    assert rank_threads.run(learned_and_dropped, RANKS, FOUR[name], keep_BNLL) == [[]] * RANKS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(rank_threads: RankThreads, dtype: torch.dtype) -> None:
    assert rank_threads.run(in_low_precision, RANKS, dtype) == [[]] * RANKS


def test_bits_depend_on_no_timing(rank_threads: RankThreads, rank_pool: RankPool) -> None:
    """Two runs in processes, and one in threads of this one."""
    runs = [of.run(every_bit, RANKS) for of in (rank_threads, rank_pool, rank_pool)]
    flat = [[x for of_rank in run for of_scheme in of_rank for x in of_scheme] for run in runs]
    assert [all(map(same_bits, flat[0], other)) for other in flat[1:]] == [True, True]


def test_no_query_head(rank_threads: RankThreads) -> None:
    assert rank_threads.run(without_heads, RANKS) == [[(0, 4)] * len(FOUR)] * RANKS


@pytest.mark.parametrize("ranks_of", ["rank_threads", "rank_pool"])
def test_a_group_of_some_ranks(request: pytest.FixtureRequest, ranks_of: str) -> None:
    assert request.getfixturevalue(ranks_of).run(in_a_part_of_the_ranks, RANKS) == [[]] * RANKS
