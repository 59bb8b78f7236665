"""A batch of Transformers as a layout says: plain, left-padded, or packed."""

import torch
from torch import Tensor

from moe_dispatch.testing import Layout

IGNORED = -100


def batch_of(token_BL: Tensor, layout: Layout) -> dict[str, Tensor]:
    """(B, L) each: ``input_ids``, ``labels``, and ``attention_mask`` or ``position_ids`` where the layout has padding
    or documents.

    No label counts what padding has to predict: what it attends to, implementations disagree about.
    """
    batch = {"input_ids": token_BL, "labels": token_BL}
    place_L = torch.arange(layout.seq, device=token_BL.device)
    if layout.left_padding:
        pads_B1 = torch.tensor(layout.left_padding, device=token_BL.device).unsqueeze(1)
        batch["attention_mask"] = (place_L >= pads_B1).long()
        batch["labels"] = token_BL.masked_fill((place_L <= pads_B1) & (pads_B1 > 0), IGNORED)
    if layout.documents:
        lengths = [torch.arange(places, device=token_BL.device) for _, places in layout.documents]
        batch["position_ids"] = torch.cat(lengths).view(layout.shape)
    return batch


def real_logits(logits_BlV: Tensor, real_Bl: Tensor) -> Tensor:
    """Zeros at padding, whose logits nobody uses."""
    return logits_BlV.masked_fill(~real_Bl.unsqueeze(-1), 0.0)
