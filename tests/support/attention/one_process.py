"""An ``attend`` with the options of the call over ranks, in one process."""

from typing import Any

import torch
from torch import Tensor

from tests.support.attention.case import Attend, Options


def whole_in_one_process(attend: Attend) -> Attend:
    """``attend`` on whole tensors, document by document where there are some."""

    def call(q_BLNH: Tensor, k_BLGH: Tensor, v_BLGH: Tensor, **options: Any) -> Tensor:
        named = {"sinks_N": "sinks_n"}
        options = {named.get(name, name): value for name, value in options.items() if value is not False}
        ends, starts = options.pop("cu_seqlens", None), options.pop("cu_seqlens_padded", None)
        if "attn_mask" in options:
            options["attn_mask"] = options["attn_mask"][(None,) * (4 - options["attn_mask"].ndim)]
        if ends is None:
            return attend(q_BLNH, k_BLGH, v_BLGH, **options)
        out_BLNH = torch.zeros(*q_BLNH.shape[:3], v_BLGH.shape[3], dtype=q_BLNH.dtype)
        out_BLNH = out_BLNH + sum(x[:, :0].sum() for x in (q_BLNH, k_BLGH, v_BLGH))
        for start, length in zip((ends if starts is None else starts).tolist(), ends.diff().tolist(), strict=False):
            real = slice(start, start + length)
            if length:
                own = of_document(options, real)
                out_BLNH[:, real] = attend(q_BLNH[:, real], k_BLGH[:, real], v_BLGH[:, real], **own)
        return out_BLNH

    return call


def of_document(options: Options, real: slice) -> Options:
    own = dict(options)
    if "attn_mask" in own:
        mask = own["attn_mask"]
        mask = mask[:, :, real] if mask.shape[2] > 1 else mask
        own["attn_mask"] = mask[..., real] if mask.shape[3] > 1 else mask
    if "key_padding_mask" in own:
        own["key_padding_mask"] = own["key_padding_mask"][:, real]
    return own
