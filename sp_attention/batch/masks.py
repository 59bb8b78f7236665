"""The attention mask of a batch, read in any of the forms that tokenizers and models give it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import is_integer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchMask:
    """The attention mask of a batch in the forms that :func:`ulysses_attention` takes, and the padding that it tells.

    Attributes:
        key_padding_mask: (B, L) bool, True attends; None if every key may be attended to.
        attn_mask: (B or 1, N or 1, L or 1, L), bool or added to the products; None if ``key_padding_mask`` says all.
        real_BL: (B, L) bool: False where no query may attend to the key; None if there is no mask.
    """

    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    real_BL: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, shape: tuple[int, int]) -> "BatchMask":
        """Read a mask in any of its forms: a host sync or two.

        Args:
            mask: (B, L), (B, 1, 1, L) or (B, 1, L, L); bool or 0/1 ints (True, 1 attends), or floats added to the
                products (0 attends; -inf, or the lowest number of a dtype as Hugging Face has it, does not).
            shape: (B, L).

        Raises:
            ValueError: another shape, or values that cannot be.
        """
        if mask is None:
            return cls()
        _check_mask(mask, shape)
        is_learned = mask.requires_grad  # so it is a bias, whatever it holds now
        mask = mask if mask.ndim == 4 else mask[:, None, None, :]
        if mask.is_floating_point():
            mask = mask.masked_fill(mask <= _lowest(mask.dtype), -torch.inf)
            open_BNLL = mask > -torch.inf
            is_bias = bool((open_BNLL & (mask != 0)).any())
        else:
            mask = open_BNLL = mask.bool()
            is_bias = False
        real_BL = open_BNLL.any(dim=(1, 2)).expand(shape)
        if is_bias or is_learned or mask.shape[1] > 1 or mask.shape[2] > 1:
            return cls(attn_mask=mask, real_BL=real_BL)
        return cls(key_padding_mask=None if bool(real_BL.all()) else real_BL, real_BL=real_BL)


def _check_mask(mask: Tensor, shape: tuple[int, int]) -> None:
    batch, length = shape
    wanted = [(batch, length), (batch, 1, 1, length), (batch, 1, length, length)]
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[2] in (1, length) and mask.shape[3] == length
    if tuple(mask.shape) != wanted[0] and not fits:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; it has to be one of {', '.join(map(str, wanted))}: the whole "
            "sequence, on every rank"
        )
    zeros_and_ones = bool(((mask == 0) | (mask == 1)).all())
    if is_integer(mask) and not zeros_and_ones:
        raise ValueError(
            "attention_mask is ints other than 0 and 1; pass cu_seqlens for documents, or floats to add to the "
            "products"
        )
    if mask.is_floating_point() and (bool(mask.isnan().any()) or (zeros_and_ones and bool((mask == 1).any()))):
        raise ValueError(
            f"attention_mask is {mask.dtype} with NaN, or with 0 and 1 alone; floats are added to the products (0 "
            "attends, -inf does not), so pass bools or ints where 1 means that a token attends"
        )


def _lowest(dtype: torch.dtype) -> float:
    """What counts as -inf: masks are cast between dtypes, and bfloat16 has the highest lowest number but for
    float16."""
    return torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).min
