"""Ask a Transformers model which mask it would make of packed documents. Nothing of it is computed but the mask."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .interface import AttentionInterface, AttentionMaskInterface

NAME = "sp_attention_asks"
BYPASSED = (
    "it does not attend through AttentionInterface and AttentionMaskInterface, so its attention cannot be cut over "
    "ranks"
)
CANNOT_BE_ASKED = "it cannot be asked which mask it makes, so its attention cannot be cut over ranks"


class _Answer(Exception):
    def __init__(self, mask_function: Any) -> None:
        super().__init__("not to be seen: it ends the forward that was asked")
        self.mask_function = mask_function


def _tell_mask(*args: Any, mask_function: Any = None, **others: Any) -> NoReturn:
    raise _Answer(mask_function)


def _tell_none(*args: Any, **others: Any) -> NoReturn:
    raise _Answer(None)


def keeps_documents_apart(model: Any) -> bool:
    """Whether the model makes a mask per document where position ids start anew.

    Raises:
        ValueError: a model that asks for no mask, or for one that is not causal; or whose code fails when asked.
    """
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, _tell_none)
    AttentionMaskInterface.register(NAME, _tell_mask)
    model.set_attn_implementation(NAME)
    try:
        mask_function = _mask_function(model)
    finally:
        model.set_attn_implementation(before)
    if mask_function is None:
        raise ValueError(BYPASSED)

    def sees(query: int, key: int) -> bool:
        index = [torch.tensor(i, device="cpu") for i in (0, 0, query, key)]
        return bool(mask_function(*index))

    if sees(0, 1) or not sees(1, 0):
        raise ValueError("its mask is not causal, and only causal attention (full or in windows) is cut over ranks")
    return not sees(2, 1)


def _mask_function(model: Any) -> Any:
    """What the innermost model asks for, called without the hooks of wrappers around it."""
    inner: nn.Module = model.base_model
    inner = getattr(inner, "language_model", inner)
    weight: Tensor = model.get_input_embeddings().weight
    x_BLD = torch.zeros(1, 3, model.config.get_text_config().hidden_size, dtype=weight.dtype, device="cpu")
    position_BL = torch.tensor([[0, 1, 0]], device="cpu")
    try:
        with torch.no_grad():
            type(inner).forward(inner, inputs_embeds=x_BLD, position_ids=position_BL, use_cache=False)
    except _Answer as answer:
        return answer.mask_function
    except Exception as error:  # of any type: it is the model's own code
        raise ValueError(f"{CANNOT_BE_ASKED} ({type(error).__name__}: {error})") from error
    return None
