"""The default ``attend`` and masks of another dtype."""

from typing import Any

import pytest
import torch

from sp_attention import scaled_dot_product
from sp_attention.blocks.dropout import Dropout


@pytest.mark.parametrize("option", ["none", "sinks", "dropout"])
@pytest.mark.parametrize(("dtype", "mask_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_the_lowest_number_of_a_wider_mask_is_a_no(dtype: torch.dtype, mask_dtype: torch.dtype, option: str) -> None:
    """As -inf is: a row of it gives 0, and no NaN. It is -inf in the narrower dtype."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "none": {},
        "sinks": {"sinks_n": torch.full((2,), -torch.inf)},
        "dropout": {"dropout": Dropout(p=0.5)},
    }[option]
    q_BLnH, k_BLgH, v_BLgH = (torch.randn(1, 4, 2, 8).to(dtype).requires_grad_() for _ in range(3))
    found = []
    for no in (torch.finfo(mask_dtype).min, -torch.inf):
        mask_LL = torch.zeros(4, 4, dtype=mask_dtype)
        mask_LL[0], mask_LL[1, 2:] = no, no
        out_BLnH = scaled_dot_product(q_BLnH, k_BLgH, v_BLgH, attn_mask=mask_LL[None, None], **options)
        assert not out_BLnH[:, 0].any()
        found.append([out_BLnH, *torch.autograd.grad(out_BLnH.float().sum(), (q_BLnH, k_BLgH, v_BLgH))])
    assert all(torch.equal(low, minus_inf) for low, minus_inf in zip(*found, strict=True))
    assert not any(x.isnan().any() for x in found[0])
