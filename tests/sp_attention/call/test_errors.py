"""Wrong calls: one text on every rank, naming the rank that is wrong where one is, and a group that works after."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import counting
from sp_attention import ulysses_attention
from sp_attention.reference import reference_attention
from tests.sp_attention.call.test_ulysses import share, world

SEQ = (3, 4)  # two ranks; batch 2, 4 query and 2 key/value heads, widths 6 and 4
Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


def right_call(rank: int, batch: int = 2) -> Arguments:
    draw = torch.Generator().manual_seed(0)
    shapes = {"q_BlNH": (4, 6), "k_BlGH": (2, 6), "v_BlGH": (2, 4)}
    wholes = {name: torch.randn(batch, sum(SEQ), *shape, generator=draw) for name, shape in shapes.items()}
    parts = {name: share(whole, SEQ, "BL", rank) for name, whole in wholes.items()}
    return {**parts, "sharding": TokenSharding(batch=batch, seq=Partition(SEQ)), "group": world()}


def call(arguments: Arguments) -> Tensor:
    return ulysses_attention(**arguments)


# ---- what is wrong -------------------------------------------------------------------------------------


def mask(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def no_options(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, *, scale: float = 1.0) -> Tensor:
    return q_BLnH[..., : v_BLgH.shape[3]] * scale


def documents(ends: list[int], starts: list[int] | None = None) -> Arguments:
    return {"cu_seqlens": torch.tensor(ends)} | ({"cu_seqlens_padded": torch.tensor(starts)} if starts else {})


SHAPE = (
    "attn_mask is {} of torch.{}; it has to broadcast to (B, N, L, L_kv) = (2, 4, 7, 7), e.g. (7, 7), (2, 1, 7, 7) "
    "or (2, 1, 1, 7), and be bool (True attends) or floating"
)
PADDING = (
    "key_padding_mask is {} of torch.{}; it has to be (B, L_kv) = (2, 7), the whole sequence on every rank, and bool "
    "(True attends)"
)
SHARD = (
    "{} is {}, but this rank's shard in order 'BL' is {}; pass the tokens that the sharding gives this rank, with "
    "all heads of the partition"
)
CAST = "q, k, v are {}; cast them to one floating-point dtype"
WINDOW = "window is {}; it is (left, right), each an int of at least -1 (-1: unlimited)"
DROPOUT = "dropout_p is {}; it has to be a number of at least 0 and below 1"
SCALE = "scale is {}; it has to be a finite number"
HEADS = "heads is {}; it has to be a Partition of the 4 query heads over 2 ranks"
TAKES_NO = "attend 'no_options' takes no {}; give it arguments of these names, or leave the options out"
UNSEEN = "attend is {}, whose arguments cannot be seen; pass a function attend(q, k, v, **options)"
AS_MANY = "k has {} heads and v {}; each key/value head has a key and a value: pass as many"
NAN = float("nan")

# Wrong on rank 1 only: (what changes there, what every rank is told after "rank 1: ").
ON_ONE_RANK: dict[str, tuple[Change, str]] = {
    "a token short": (
        lambda a: {"q_BlNH": a["q_BlNH"][:, 1:]},
        SHARD.format("q", (2, 3, 4, 6), (2, 4, 4, 6)),
    ),
    "keys short": (lambda a: {"k_BlGH": a["k_BlGH"][:, 1:]}, SHARD.format("k", (2, 3, 2, 6), (2, 4, 2, 6))),
    "values short": (lambda a: {"v_BlGH": a["v_BlGH"][:, 1:]}, SHARD.format("v", (2, 3, 2, 4), (2, 4, 2, 4))),
    "a row short": (lambda a: {"q_BlNH": a["q_BlNH"][:1]}, SHARD.format("q", (1, 4, 4, 6), (2, 4, 4, 6))),
    "values of fewer heads": (lambda a: {"v_BlGH": a["v_BlGH"][:, :, :1]}, AS_MANY.format(2, 1)),
    "keys of fewer heads": (lambda a: {"k_BlGH": a["k_BlGH"][:, :, :1]}, AS_MANY.format(1, 2)),
    "keys of heads in no groups": (
        lambda a: {"k_BlGH": a["k_BlGH"][:, :, [0, 1, 0]]},
        SHARD.format("k", (2, 4, 3, 6), (2, 4, 2, 6)),
    ),
    "values of heads in no groups": (
        lambda a: {"v_BlGH": a["v_BlGH"][:, :, [0, 1, 0]]},
        SHARD.format("v", (2, 4, 3, 4), (2, 4, 2, 4)),
    ),
    "no key head": (
        lambda a: {"k_BlGH": a["k_BlGH"][:, :, :0]},
        SHARD.format("k", (2, 4, 0, 6), (2, 4, 2, 6)),
    ),
    "queries of other heads than given": (
        lambda a: {"q_BlNH": a["q_BlNH"][:, :, :3], "heads": Partition((2, 2))},
        SHARD.format("q", (2, 4, 3, 6), (2, 4, 4, 6)),
    ),
    "queries of half the heads given": (
        lambda a: {"q_BlNH": a["q_BlNH"][:, :, :2], "heads": Partition((2, 2))},
        SHARD.format("q", (2, 4, 2, 6), (2, 4, 4, 6)),
    ),
    "heads of three": (lambda a: {"heads": Partition((2, 1))}, HEADS.format("Partition(sizes=(2, 1))")),
    "heads of one": (lambda a: {"heads": Partition((1, 0))}, HEADS.format("Partition(sizes=(1, 0))")),
    "heads of none": (lambda a: {"heads": Partition((0, 0))}, HEADS.format("Partition(sizes=(0, 0))")),
    "heads over three": (lambda a: {"heads": Partition((2, 1, 1))}, HEADS.format("Partition(sizes=(2, 1, 1))")),
    "a tuple of heads": (lambda a: {"heads": (2, 2)}, HEADS.format("(2, 2)")),
    "queries of no width": (
        lambda a: {"q_BlNH": a["q_BlNH"][..., :0]},
        SHARD.format("q", (2, 4, 4, 0), (2, 4, 4, 6)),
    ),
    "keys of no width": (
        lambda a: {"k_BlGH": a["k_BlGH"][..., :0]},
        SHARD.format("k", (2, 4, 2, 0), (2, 4, 2, 6)),
    ),
    "keys of another width": (
        lambda a: {"k_BlGH": a["k_BlGH"][..., 1:]},
        SHARD.format("k", (2, 4, 2, 5), (2, 4, 2, 6)),
    ),
    "mixed dtypes of q": (
        lambda a: {"q_BlNH": a["q_BlNH"].double()},
        CAST.format("torch.float64, torch.float32, torch.float32"),
    ),
    "mixed dtypes of k": (
        lambda a: {"k_BlGH": a["k_BlGH"].bfloat16()},
        CAST.format("torch.float32, torch.bfloat16, torch.float32"),
    ),
    "ints": (
        lambda a: {name: a[name].int() for name in ("q_BlNH", "k_BlGH", "v_BlGH")},
        CAST.format("torch.int32, torch.int32, torch.int32"),
    ),
    "keys on another device": (
        lambda a: {"k_BlGH": a["k_BlGH"].to("meta")},
        "q, k, v are on cpu, meta, cpu; move them to one device",
    ),
    "queries on another device": (
        lambda a: {"q_BlNH": a["q_BlNH"].to("meta")},
        "q, k, v are on meta, cpu, cpu; move them to one device",
    ),
    "a mask on another device": (
        lambda a: {"attn_mask": mask(7, 7).to("meta")},
        "attn_mask is on meta, but q, k, v on cpu; move it there",
    ),
    "padding on another device": (
        lambda a: {"key_padding_mask": mask(2, 7).to("meta")},
        "key_padding_mask is on meta, but q, k, v on cpu; move it there",
    ),
    "sinks on another device": (
        lambda a: {"sinks_N": torch.zeros(4, device="meta")},
        "sinks_N is on meta, but q, k, v on cpu; move it there",
    ),
    "a list for a mask": (lambda a: {"attn_mask": [[True]]}, "attn_mask is list; it has to be a tensor"),
    "a list for padding": (
        lambda a: {"key_padding_mask": [[True] * 7] * 2},
        "key_padding_mask is list; it has to be a tensor",
    ),
    "a list of sinks": (lambda a: {"sinks_N": [0.0] * 4}, "sinks_N is list; it has to be a tensor"),
    "causal of 1": (lambda a: {"is_causal": 1}, "is_causal is 1; it has to be True or False"),
    "mask of another length": (lambda a: {"attn_mask": mask(7, 4)}, SHAPE.format((7, 4), "bool")),
    "mask of other heads": (lambda a: {"attn_mask": mask(2, 2, 7, 7)}, SHAPE.format((2, 2, 7, 7), "bool")),
    "mask of five dimensions": (lambda a: {"attn_mask": mask(1, 1, 1, 7, 7)}, SHAPE.format((1, 1, 1, 7, 7), "bool")),
    "mask of ints": (lambda a: {"attn_mask": mask(7, 7, dtype=torch.int64)}, SHAPE.format((7, 7), "int64")),
    "padding of the local length": (lambda a: {"key_padding_mask": mask(2, 4)}, PADDING.format((2, 4), "bool")),
    "padding of floats": (
        lambda a: {"key_padding_mask": mask(2, 7, dtype=torch.float32)},
        PADDING.format((2, 7), "float32"),
    ),
    "sinks of other heads": (
        lambda a: {"sinks_N": torch.zeros(3)},
        "sinks_N is (3,); it has to be (4,), one logit per query head",
    ),
    "window of one": (lambda a: {"window": (2,)}, WINDOW.format("(2,)")),
    "window below -1": (lambda a: {"window": (-2, 0)}, WINDOW.format("(-2, 0)")),
    "window of floats": (lambda a: {"window": (1.5, 0)}, WINDOW.format("(1.5, 0)")),
    "window of a number": (lambda a: {"window": 2}, WINDOW.format("2")),
    "window of letters": (lambda a: {"window": "ab"}, WINDOW.format("'ab'")),
    "scale of nan": (lambda a: {"scale": NAN}, SCALE.format("nan")),
    "scale of infinity": (lambda a: {"scale": float("inf")}, SCALE.format("inf")),
    "scale beyond the floats": (lambda a: {"scale": 10**400}, SCALE.format(10**400)),
    "scale of a tensor": (lambda a: {"scale": torch.tensor(0.5)}, SCALE.format("tensor(0.5000)")),
    "scale of letters": (lambda a: {"scale": "0.5"}, SCALE.format("'0.5'")),
    "dropout of a tensor": (
        lambda a: {"dropout_p": torch.tensor([0.5, 0.5])},
        DROPOUT.format("tensor([0.5000, 0.5000])"),
    ),
    "dropout of letters": (lambda a: {"dropout_p": "0.5"}, DROPOUT.format("'0.5'")),
    "dropout of 1": (lambda a: {"dropout_p": 1.0}, DROPOUT.format("1.0")),
    "dropout below 0": (lambda a: {"dropout_p": -0.1}, DROPOUT.format("-0.1")),
    "dropout of nan": (lambda a: {"dropout_p": NAN}, DROPOUT.format("nan")),
    "float documents": (
        lambda a: {"cu_seqlens": torch.tensor([0.0, 7.0])},
        "cu_seqlens is (2,) of torch.float32; it has to be a tensor (documents + 1,) of int32 or int64",
    ),
    "documents in two dimensions": (
        lambda a: {"cu_seqlens": torch.tensor([0, 7]), "cu_seqlens_padded": torch.tensor([[0, 7]])},
        "cu_seqlens_padded is (1, 2) of torch.int64; it has to be a tensor (documents + 1,) of int32 or int64",
    ),
    "a list of documents": (
        lambda a: {"cu_seqlens": [0, 7]},
        "cu_seqlens is list; it has to be a tensor (documents + 1,) of int32 or int64",
    ),
    "padding without documents": (
        lambda a: {"cu_seqlens_padded": torch.tensor([0, 7])},
        "cu_seqlens_padded without cu_seqlens; pass both, or cu_seqlens alone where nothing is padded",
    ),
    "documents of two rows": (
        lambda a: documents([0, 7]),
        "documents in a batch of 2 with 7 queries and 7 keys; pack them into one row (B = 1) of self-attention, or "
        "use key_padding_mask",
    ),
}

ENDS = "cu_seqlens is {}; it has to start at 0 and never fall"
STARTS = (
    "cu_seqlens_padded is {} for cu_seqlens {}; it needs as many entries, each document's start, far enough apart "
)
STARTS += "for the real tokens"
PAST = (
    "documents end at {} of a packed sequence of 7 tokens; cu_seqlens has to end at the length, or pass "
    "cu_seqlens_padded to say where padding is"
)

# Wrong documents in one row of 7 tokens, on rank 1 only.
DOCUMENTS: dict[str, tuple[Arguments, str]] = {
    "not from 0": (documents([1, 7]), ENDS.format([1, 7])),
    "falling": (documents([0, 5, 3, 7]), ENDS.format([0, 5, 3, 7])),
    "no entry": ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, ENDS.format([])),
    "short of the length": (documents([0, 3, 6]), PAST.format(6)),
    "past the length": (documents([0, 3, 8]), PAST.format(8)),
    "padded: another number": (documents([0, 3, 6], [0, 3]), STARTS.format([0, 3], [0, 3, 6])),
    "padded: too near": (documents([0, 3, 6], [0, 2, 6]), STARTS.format([0, 2, 6], [0, 3, 6])),
    "padded: last one cut": (documents([0, 3, 6], [0, 3, 5]), STARTS.format([0, 3, 5], [0, 3, 6])),
    "padded: past the length": (documents([0, 3, 6], [0, 4, 8]), PAST.format(8)),
    "padded: from below 0": (documents([0, 3, 6], [-1, 3, 6]), PAST.format(6)),
}


def of_dtype(dtype: torch.dtype) -> Change:
    return lambda a: {name: a[name].to(dtype) for name in ("q_BlNH", "k_BlGH", "v_BlGH")}


def keys_of(seq: tuple[int, ...], ranks: tuple[int, ...] = (0, 1)) -> Change:
    """A sharding of keys, and keys and values of as many tokens as rank 0 or 1 has in (3, 4)."""
    return lambda a: {"kv_sharding": TokenSharding(batch=1, seq=Partition(seq)).select(ranks)}


def given(**options: Any) -> Change:
    return lambda a: options


# What differs between ranks: (on all of them, on rank 1), and words of either that tell. Of the same sizes: see
# shard_batch for the others.
DISAGREEMENTS: dict[str, tuple[Change, Change, tuple[str, str]]] = {
    "is_causal": (given(), given(is_causal=True), ("; ; one document", "; is_causal True; one document")),
    "window": (given(window=(2, 0)), given(window=(3, 0)), ("window (2, 0)", "window (3, 0)")),
    "scale": (given(), given(scale=0.5), ("; ; one document", "scale 0.5")),
    "dropout_p": (given(), given(dropout_p=0.5), ("; ; one document", "dropout 0.5")),
    "attn_mask": (given(), given(attn_mask=mask(7, 7)), ("; ; one document", "attn_mask (7, 7) of torch.bool")),
    "dtype of the mask": (
        given(attn_mask=mask(7, 7, dtype=torch.float32)),
        given(attn_mask=mask(7, 7, dtype=torch.bfloat16)),
        ("attn_mask (7, 7) of torch.float32", "attn_mask (7, 7) of torch.bfloat16"),
    ),
    "key_padding_mask": (
        given(),
        given(key_padding_mask=mask(1, 7)),
        ("; ; one document", "key_padding_mask (1, 7) of torch.bool"),
    ),
    "sinks_N": (given(), given(sinks_N=torch.zeros(4)), ("; ; one document", "sinks_n (4,) of torch.float32")),
    "cu_seqlens": (
        given(**documents([0, 3, 7])),
        given(**documents([0, 4, 7])),
        ("ends=(0, 3, 7)", "ends=(0, 4, 7)"),
    ),
    "cu_seqlens_padded": (
        given(**documents([0, 3, 6], [0, 3, 7])),
        given(**documents([0, 3, 6], [0, 4, 7])),
        ("starts=(0, 3, 7)", "starts=(0, 4, 7)"),
    ),
    "documents or none": (given(), given(**documents([0, 3, 7])), ("one document", "ends=(0, 3, 7)")),
    "heads of the same size": (
        given(heads=Partition((2, 2))),
        given(heads=Partition((1, 3))),
        ("query heads (2, 2)", "query heads (1, 3)"),
    ),
    "key/value heads": (
        given(),
        lambda a: {name: a[name][:, :, :1] for name in ("k_BlGH", "v_BlGH")},
        ("2 key/value heads", "1 key/value heads"),
    ),
    "dtype": (of_dtype(torch.bfloat16), of_dtype(torch.float16), ("torch.bfloat16, widths", "torch.float16, widths")),
    "lengths of keys": (
        keys_of((3, 4)),
        keys_of((4, 3), (1, 0)),
        ("keys (3, 4), shards (0, 1)", "keys (4, 3), shards (1, 0)"),
    ),
    "gradients": (
        given(),
        lambda a: {"k_BlGH": a["k_BlGH"].clone().requires_grad_()},
        ("gradients of q, k or v False, of options False", "gradients of q, k or v True, of options False"),
    ),
    "gradients of what is learned": (
        given(sinks_N=torch.zeros(4)),
        given(sinks_N=torch.zeros(4, requires_grad=True)),
        ("gradients of q, k or v False, of options False", "gradients of q, k or v False, of options True"),
    ),
    "gradients of what is learned only": (
        given(sinks_N=torch.zeros(4, requires_grad=True)),
        lambda a: {"q_BlNH": a["q_BlNH"].clone().requires_grad_(), "sinks_N": torch.zeros(4, requires_grad=True)},
        ("gradients of q, k or v False, of options True", "gradients of q, k or v True, of options True"),
    ),
}

SAME = "it has to be (B, l, heads, width), or (l, B, heads, width)"
OF_THREE = (
    "describes 3 ranks, but the group has 2; they have to be equal, one piece per rank in the group's rank order "
)
OF_THREE += "(for a group that is part of a mesh: sharding.select(ranks))"
BY_GROUPS = (
    "{} query heads over {} key/value heads; each key/value head serves the same number of query heads, so their "
    "number has to divide that of the query heads"
)

# What attend cannot honour, and what leaves open how much there is to send: refused before any collective, on the
# ranks that have it.
BEFORE: dict[str, tuple[Change, str]] = {
    "torch's own attention": (
        lambda a: {"attend": F.scaled_dot_product_attention},
        "attend is torch's scaled_dot_product_attention, which takes (B, n, L, H) and would read lengths as heads; "
        "leave attend out to use it in the right layout",
    ),
    "an attend without a signature": (lambda a: {"attend": max}, UNSEEN.format("<built-in function max>")),
    "an attend that is none": (lambda a: {"attend": 3}, UNSEEN.format("3")),
    "causal refused": (lambda a: {"attend": no_options, "is_causal": True}, TAKES_NO.format("is_causal")),
    "window refused": (lambda a: {"attend": no_options, "window": (2, 0)}, TAKES_NO.format("window")),
    "masks refused": (
        lambda a: {"attend": no_options, "attn_mask": mask(7, 7), "key_padding_mask": mask(2, 7), "scale": 2.0},
        TAKES_NO.format("attn_mask, key_padding_mask"),
    ),
    "sinks refused": (lambda a: {"attend": no_options, "sinks_N": torch.zeros(4)}, TAKES_NO.format("sinks_n")),
    "dropout refused": (lambda a: {"attend": no_options, "dropout_p": 0.5}, TAKES_NO.format("dropout")),
    "three dimensions": (lambda a: {"v_BlGH": torch.zeros(2, 3, 2)}, f"v is (2, 3, 2); {SAME}"),
    "no tensor": (lambda a: {"k_BlGH": None}, f"k is NoneType; {SAME}"),
    "heads in no groups": (lambda a: {"q_BlNH": a["q_BlNH"][:, :, :3]}, BY_GROUPS.format(3, 2)),
    "no key/value head": (
        lambda a: {name: a[name][:, :, :0] for name in ("k_BlGH", "v_BlGH")},
        BY_GROUPS.format(4, 0),
    ),
    "no width": (
        lambda a: {name: a[name][..., :0] for name in ("q_BlNH", "k_BlGH")},
        "q and k have width 0, so there are no products; each head needs a width of at least 1",
    ),
    "no group": (
        lambda a: {"group": None},
        "group is None; pass the process group explicitly, e.g. torch.distributed.group.WORLD once "
        "init_process_group has run, or device_mesh.get_group()",
    ),
    "no sharding": (
        lambda a: {"sharding": None},
        "sharding is None; pass the TokenSharding that says which tokens each rank holds",
    ),
    "sharding of three": (
        lambda a: {"sharding": TokenSharding(batch=2, seq=Partition((3, 3, 1)))},
        f"the token sharding {OF_THREE}",
    ),
    "keys over three": (
        lambda a: {"kv_sharding": TokenSharding(batch=2, seq=Partition((3, 3, 1)))},
        f"the token sharding {OF_THREE}",
    ),
    "batch cut": (
        lambda a: {"sharding": TokenSharding(batch=Partition((1, 1)), seq=7)},
        "the batch is cut into (1, 1), but attention needs each rank to hold a part of every sequence; describe the "
        "one row of the mesh that this group is: batch=<its rows>, an int",
    ),
    "keys of another batch": (
        lambda a: {"kv_sharding": TokenSharding(batch=1, seq=Partition(SEQ))},
        "queries are TokenSharding(batch=Partition(sizes=(2,)), seq=Partition(sizes=(3, 4)), order='BL', "
        "rectangles=(0, 1)), keys and values TokenSharding(batch=Partition(sizes=(1,)), seq=Partition(sizes=(3, 4)), "
        "order='BL', rectangles=(0, 1)); they may differ in the sequence only, not in the batch or the order",
    ),
}


# ---- cases: what the ranks run -------------------------------------------------------------------------


def told(arguments: Arguments) -> str:
    """The text of the refusal."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller compares the whole text)
        call(arguments)
    return str(error.value)


def works(rank: int) -> bool:
    """The group, after an error: a call, and a collective of another kind."""
    arguments = right_call(rank)
    draw = torch.Generator().manual_seed(0)
    wholes = [torch.randn(2, sum(SEQ), *shape, generator=draw) for shape in ((4, 6), (2, 6), (2, 4))]
    total = torch.ones(())
    dist.all_reduce(total)
    wanted_BlNH = share(reference_attention(*wholes), SEQ, "BL", rank)
    return total.item() == 2 and torch.allclose(call(arguments), wanted_BlNH, atol=1e-5)


def wrong_on_rank_1(rank: int, name: str) -> tuple[str, bool]:
    arguments = right_call(rank)
    if rank == 1:
        arguments |= ON_ONE_RANK[name][0](arguments)
    return told(arguments), works(rank)


def wrong_documents_on_rank_1(rank: int, name: str) -> tuple[str, bool]:
    arguments = right_call(rank, batch=1) | (DOCUMENTS[name][0] if rank else documents([0, 3, 7]))
    return told(arguments), works(rank)


def wrong_on_both(rank: int, name: str) -> tuple[str, bool]:
    arguments = right_call(rank)
    return told(arguments | ON_ONE_RANK[name][0](arguments)), works(rank)


def disagree(rank: int, name: str) -> tuple[str, bool]:
    arguments, (ours, theirs, _) = right_call(rank, batch=1), DISAGREEMENTS[name]
    return told(arguments | (theirs if rank else ours)(arguments)), works(rank)


def permuted_keys(rank: int) -> tuple[str, bool]:
    """Keys of equal shards, which rank 1 takes to lie the other way round."""
    arguments, sharding = right_call(rank), TokenSharding(batch=2, seq=Partition((3, 3)))
    arguments |= {name: arguments[name][:, :3] for name in ("k_BlGH", "v_BlGH")}
    return told(arguments | {"kv_sharding": sharding.select((1, 0)) if rank else sharding}), works(rank)


def refused_before(rank: int, name: str) -> tuple[str, list[str]]:
    arguments = right_call(rank)
    with counting() as counts:
        text = told(arguments | BEFORE[name][0](arguments))
    return text, counts.collectives


def wrong_on_two(rank: int) -> tuple[str, bool]:
    arguments = right_call(rank)
    return told(arguments | {"window": (rank - 3, 0)}), works(rank)


def sharding_differs(rank: int) -> tuple[str, bool]:
    """Rank 1 cuts the sequence otherwise, and has what its own cut gives it."""
    arguments = right_call(rank)
    if rank == 1:
        cut = {name: arguments[name][:, :3] for name in ("q_BlNH", "k_BlGH", "v_BlGH")}
        arguments |= cut | {"sharding": TokenSharding(batch=2, seq=Partition((4, 3)))}
    return told(arguments), works(rank)


def order_differs(rank: int) -> tuple[str, bool]:
    """Rank 1 has sequence-first tensors, and says so: the same number of values."""
    arguments = right_call(rank)
    if rank == 1:
        arguments |= {name: arguments[name].transpose(0, 1) for name in ("q_BlNH", "k_BlGH", "v_BlGH")}
        arguments["sharding"] = TokenSharding(batch=2, seq=Partition(SEQ), order="LB")
    return told(arguments), works(rank)


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_one_ranks_mistake_is_told_to_all(rank_pool: RankPool, name: str) -> None:
    """Invariant 7."""
    assert rank_pool.run(wrong_on_rank_1, 2, name, timeout=20) == [(f"rank 1: {ON_ONE_RANK[name][1]}", True)] * 2


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_a_mistake_of_every_rank_is_told_to_all(rank_pool: RankPool, name: str) -> None:
    """Where all of them pass the same heads, say."""
    (text, usable), *others = rank_pool.run(wrong_on_both, 2, name, timeout=20)
    assert others == [(text, usable)]
    assert usable
    of_rank_0, of_rank_1 = text.split("; rank 1: ")
    assert of_rank_1 == ON_ONE_RANK[name][1]
    assert of_rank_0.startswith(f"rank 0: {of_rank_1[:5]}")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_wrong_documents(rank_pool: RankPool, name: str) -> None:
    wanted = f"rank 1: {DOCUMENTS[name][1]}", True
    assert rank_pool.run(wrong_documents_on_rank_1, 2, name, timeout=20) == [wanted] * 2


def test_two_mistakes_are_both_told(rank_pool: RankPool) -> None:
    text = "; ".join(f"rank {rank}: {WINDOW.format((rank - 3, 0))}" for rank in (0, 1))
    assert rank_pool.run(wrong_on_two, 2) == [(text, True)] * 2


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_are_told_apart(rank_pool: RankPool, name: str) -> None:
    (text, usable), *others = rank_pool.run(disagree, 2, name, timeout=20)
    ours, theirs = text.split("; rank [1]: ")
    assert others == [(text, usable)]
    assert usable
    assert ours.startswith("the ranks disagree about one call (rank [0]: torch.")
    assert ", widths (6, 4), query heads (" in ours
    assert theirs.endswith("; every rank of the group has to pass the same values")
    assert DISAGREEMENTS[name][2][0] in ours
    assert DISAGREEMENTS[name][2][1] in theirs


@pytest.mark.parametrize("name", BEFORE)
def test_what_every_rank_sees_is_refused_before_any_collective(rank_pool: RankPool, name: str) -> None:
    """Invariant 12, where every rank has it."""
    assert rank_pool.run(refused_before, 2, name, timeout=20) == [(BEFORE[name][1], [])] * 2


@pytest.mark.parametrize("case", [sharding_differs, order_differs, permuted_keys])
def test_shardings_that_differ_between_ranks(rank_pool: RankPool, case: Callable[[int], tuple[str, bool]]) -> None:
    """Ranks that expect other sizes of each other, or the same in another order."""
    (text, usable), *others = rank_pool.run(case, 2, timeout=20)
    assert others == [(text, usable)]
    assert usable
    assert text.startswith("the ranks disagree about one call (rank [0]: torch.float32, ")
