"""A router whose choice somebody else makes. Everything else that it computes stays its own."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TOPK = (torch.topk, Tensor.topk)
MASKED = (torch.masked_fill, Tensor.masked_fill)
# Attributes that tell K: of a router, and of the config where routers have none.
COUNT, COUNT_OF_CONFIG = "top_k", "top_k_experts"


class ForcedChoice(TorchFunctionMode):
    """While a router runs under it, its ``topk`` of K among all E scores of each token gives the experts of a record,
    and the scores that these have. What closes experts to that choice (groups that are not among the best) closes
    none: a score of 0 for an expert of a closed group would have no gradient.

    Args:
        num_experts: E.
        num_choices: K.
        answer: the (T, K) experts of as many tokens, -1 for none; None where the router is to choose.
    """

    def __init__(self, num_experts: int, num_choices: int, answer: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self._num_experts, self._num_choices, self._answer = num_experts, num_choices, answer

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in TOPK and self._is_choice(*args, **kwargs):
            scores_TE = args[0] if args else kwargs["input"]
            expert_TK = self._answer(scores_TE)
            if expert_TK is not None:
                given_TK = expert_TK.clamp(min=0)
                return torch.return_types.topk((scores_TE.gather(1, given_TK), given_TK))
        if func in MASKED and self._closes_experts(*args, **kwargs):
            return args[0]
        return func(*args, **kwargs)

    def _is_choice(self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> bool:
        return k == self._num_choices and dim in (-1, 1) and largest and self._is_of_scores(input)

    def _closes_experts(self, input: Tensor, mask: Tensor, value: Any) -> bool:
        return self._is_of_scores(input) and input.is_floating_point() and mask.shape == input.shape

    def _is_of_scores(self, x: Tensor) -> bool:
        return x.ndim == 2 and x.shape[1] == self._num_experts


def num_choices(name: str, block: nn.Module, experts: Any) -> int:
    """K of the router of a block; ValueError where it does not tell."""
    told = {getattr(module, COUNT, None) for module in block.modules()} - {None}
    told = told or {getattr(experts.config, COUNT_OF_CONFIG, None)}
    counts = [count for count in told if isinstance(count, int)]
    if len(counts) != 1:
        raise ValueError(
            f"{name}: the router of {type(block).__name__} does not tell how many experts a token goes to; modules "
            f"there have {COUNT} = {sorted(map(str, told))}, and one number is needed"
        )
    return counts[0]
