"""What one rank has wrong, and what every rank is told of it; of ``wrong_calls.right_call``."""

import torch

from moe_dispatch import Partition
from tests.support.attention.wrong_calls import Change, documents, mask

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
        "cu_seqlens is (2,) of torch.float32; it has to be a tensor (documents + 1,) of ints",
    ),
    "documents in two dimensions": (
        lambda a: {"cu_seqlens": torch.tensor([0, 7]), "cu_seqlens_padded": torch.tensor([[0, 7]])},
        "cu_seqlens_padded is (1, 2) of torch.int64; it has to be a tensor (documents + 1,) of ints",
    ),
    "a list of documents": (
        lambda a: {"cu_seqlens": [0, 7]},
        "cu_seqlens is list; it has to be a tensor (documents + 1,) of ints",
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
