"""How a Transformers model lays out its experts, read from what its decorator sets; and their computation.

    gate_up_proj (E, 2F, D), or (E, D, 2F) where transposed; up_proj (E, F, D) where there is no gate
    down_proj    (E, D, F), or (E, F, D) where transposed
    ..._bias     (E, 2F) or (E, F), and (E, D), where there are biases

Gate and up may be concatenated or interleaved: the model's own ``_apply_gate`` knows.
"""

from typing import Any

from torch import Tensor, nn

from ...layer.experts import RowGroups, grouped_product
from ...wire.local_tensors import is_dtensor

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Transformers' own gate, which takes gate and up to be concatenated.
OWN_GATE = "_default_apply_gate"


def is_experts(module: nn.Module) -> bool:
    """Has Transformers' decorator made it?"""
    return all(flag in vars(module) for flag in FLAGS)


def problem_of_layout(experts: Any) -> str:
    """Why these experts cannot be cut over ranks and computed; empty if they can."""
    kind, total = type(experts).__name__, getattr(experts, "num_experts", None)
    if not isinstance(total, int) or total < 1:
        return f"{kind} has num_experts {total!r}; it has to be an int of at least 1"
    if getattr(experts, "has_post_expert_norm", False):
        return f"{kind} normalises what each expert gives, which this library does not compute"
    if not experts.is_concatenated and type(experts)._apply_gate.__name__ == OWN_GATE:
        return f"{kind} interleaves gate and up, and has no _apply_gate that takes them apart"
    known = set(names_of_parameters(experts))
    tensors = {**dict(experts.named_parameters()), **dict(experts.named_buffers())}
    if set(tensors) != known:
        return f"{kind} has the tensors {sorted(tensors)}, and those that this library knows are {sorted(known)}"
    for name, x in tensors.items():
        if is_dtensor(x):
            return (
                f"{name} of {kind} is a DTensor; cut experts first, and shard (fully_shard) what is left afterwards"
            )
        dims = 2 if name.endswith("_bias") else 3
        if x.ndim != dims or len(x) != total:
            return f"{name} of {kind} is {tuple(x.shape)}; it has to have {dims} dimensions, first {total} experts"
    if not experts.has_gate and not callable(getattr(experts, "act_fn", None)):
        return f"{kind} has no gate and no act_fn"
    return ""


def names_of_parameters(experts: Any) -> tuple[str, ...]:
    """Of one that has the known layout."""
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    return (*names, *(f"{name}_bias" for name in names if experts.has_bias))


def compute(experts: Any, x_MD: Tensor, rows_per_expert_e: Tensor) -> Tensor:
    """(M, D) what this rank's experts make of their rows, unweighted. Without rows or experts, too, it is computed
    from both: a rank that leaves the graph would leave its peers waiting in backward."""
    up, down = names_of_parameters(experts)[:2]
    groups = RowGroups(rows_per_expert_e)
    h_MF = _product(experts, up, x_MD, groups)
    h_MF = experts._apply_gate(h_MF) if experts.has_gate else experts.act_fn(h_MF)
    return _product(experts, down, h_MF, groups)


def _product(experts: Any, name: str, x_MI: Tensor, groups: RowGroups) -> Tensor:
    w = getattr(experts, name)
    y_MO = grouped_product(x_MI, w if experts.is_transposed else w.transpose(1, 2), groups)
    if not experts.has_bias:
        return y_MO
    bias_eO = getattr(experts, f"{name}_bias")
    return y_MO + bias_eO.repeat_interleave(groups.rows_per_expert_e, 0, output_size=len(x_MI)).to(y_MO.dtype)
