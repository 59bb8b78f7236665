"""What every rank sees of itself, wrong; of ``wrong_calls.right_call``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from tests.support.attention.wrong_calls import SEQ, Change, mask


def no_options(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, *, scale: float = 1.0) -> Tensor:
    return q_BLnH[..., : v_BLgH.shape[3]] * scale


TAKES_NO = "attend 'no_options' takes no {}; give it arguments of these names, or leave the options out"
UNSEEN = "attend is {}, whose arguments cannot be seen; pass a function attend(q, k, v, **options)"
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
