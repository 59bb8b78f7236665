"""SwiGLU experts over ragged rows."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..rows.sums import VALUES_AT_ONCE, VALUES_AT_ONCE_CPU
from ..wire.autocast import cast_to_autocast, without_autocast
from ..wire.uncompiled import uncompiled

GROUPED_ON = (9, 10)  # major compute capabilities


class GroupedExperts(nn.Module):
    """This rank's experts: ``down(weight * silu(gate(x)) * up(x))`` for each expert's rows.

    The routing weight multiplies the hidden row, before the bias-free down-projection: the same as on the output, and
    narrower. Under ``torch.autocast`` products are of its dtype, as those of ``nn.Linear``.

    On CUDA of compute capability 9 and 10, bfloat16 rows and weights (also those of autocast), with D and F multiples
    of 8, run without the host; others are multiplied expert by expert, which waits for the counts, once per forward.

    Args:
        num_experts: e, the experts of this rank; 0 is ordinary.
        dim: D.
        hidden: F.

    Attributes:
        gate_eDF: weights of the gate. An expert without rows gets a zero gradient, not a missing one.
        up_eDF: weights beside the gate.
        down_eFD: weights of the way back to D.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden = num_experts, dim, hidden
        self.gate_eDF = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.up_eDF = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.down_eFD = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, with standard deviation (input width) ** -0.5."""
        for parameter in (self.gate_eDF, self.up_eDF, self.down_eFD):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, x_MD: Tensor, rows_per_expert_e: Tensor, weight_M: Tensor) -> Tensor:
        """The experts' weighted outputs.

        Args:
            x_MD: rows by expert, as ``dispatch`` gives them.
            rows_per_expert_e: how many rows each expert has; they sum to M, or to less, where the last rows are
                those that a static plan does not use. Their outputs mean nothing.
            weight_M: the weight of each row; may be float32 with bfloat16 rows.

        Returns:
            (M, D), in the dtype of ``x_MD``.

        Raises:
            ValueError: counts for another number of experts, or weights for another number of rows.
        """
        if len(rows_per_expert_e) != self.num_experts or len(weight_M) != len(x_MD):
            raise ValueError(
                f"{len(x_MD)} rows with {len(weight_M)} weights for {len(rows_per_expert_e)} experts, but there are "
                f"{self.num_experts} experts here; pass the rows and weights of dispatch and the rows_per_expert_e "
                "of its plan"
            )
        groups = RowGroups(rows_per_expert_e)
        hidden_MF = F.silu(grouped_product(x_MD, self.gate_eDF, groups))
        hidden_MF = hidden_MF * grouped_product(x_MD, self.up_eDF, groups)
        return grouped_product(weighted(hidden_MF, weight_M, x_MD.dtype), self.down_eFD, groups).to(x_MD.dtype)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}"


def weighted(x_MF: Tensor, weight_M: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows times their weights, multiplied in the wider dtype of the two and rounded once to ``dtype``."""
    is_wider = torch.promote_types(x_MF.dtype, weight_M.dtype) == weight_M.dtype != dtype == x_MF.dtype
    if not is_wider or x_MF.numel() <= VALUES_AT_ONCE_CPU or torch.compiler.is_compiling():
        return (x_MF * weight_M.unsqueeze(1)).to(dtype)
    return _Weighted.apply(x_MF, weight_M)  # type: ignore[return-value]


class _Weighted(torch.autograd.Function):
    """forward   y_MF = w_M x_MF, rounded to the dtype of x
    backward  d x_MF = w_M d y_MF, rounded as well;  d w_M = the sum over F of x_MF d y_MF

    Both in pieces that fit a cache, where torch makes (M, F) in float32: for 8192 rows of 1408 on one core, 9 instead
    of 43 ms, and 20 instead of 85 in backward.
    """

    @staticmethod
    def forward(ctx: Any, x_MF: Tensor, weight_M: Tensor) -> Tensor:
        ctx.save_for_backward(x_MF, weight_M)
        return _weigh(x_MF, weight_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x_MF, weight_M), (grad_MF,) = ctx.saved_tensors, grads
        if torch.is_grad_enabled():  # for a gradient of the gradient
            wide_MF = grad_MF.to(weight_M.dtype)
            return (wide_MF * weight_M.unsqueeze(1)).to(x_MF.dtype), (wide_MF * x_MF).sum(1)
        for_x, for_weight = ctx.needs_input_grad
        return (
            _weigh(grad_MF, weight_M) if for_x else None,
            _dot(grad_MF, x_MF, weight_M.dtype) if for_weight else None,
        )


def _weigh(x_MF: Tensor, weight_M: Tensor) -> Tensor:
    out_MF = torch.empty_like(x_MF)
    rows = _rows_at_once(x_MF)
    for out, x, weight in zip(out_MF.split(rows), x_MF.split(rows), weight_M.split(rows), strict=True):
        torch.mul(x, weight.unsqueeze(1), out=out)
    return out_MF


def _dot(a_MF: Tensor, b_MF: Tensor, dtype: torch.dtype) -> Tensor:
    """(M,): the product of each row of both, summed in ``dtype``."""
    out_M = a_MF.new_empty(len(a_MF), dtype=dtype)
    rows = _rows_at_once(a_MF)
    for out, a, b in zip(out_M.split(rows), a_MF.split(rows), b_MF.split(rows), strict=True):
        torch.sum(a.to(dtype).mul_(b), 1, out=out)
    return out_M


def _rows_at_once(x_MF: Tensor) -> int:
    at_once = VALUES_AT_ONCE_CPU if x_MF.device.type == "cpu" else VALUES_AT_ONCE
    return max(at_once // max(x_MF.shape[1], 1), 1)


class RowGroups:
    """How many rows each expert has, in the forms that products want; each is made once."""

    def __init__(self, rows_per_expert_e: Tensor) -> None:
        self.rows_per_expert_e = rows_per_expert_e

    @cached_property
    def ends_e(self) -> Tensor:
        """Where the rows of each end."""
        return self.rows_per_expert_e.cumsum(0).to(torch.int32)

    @cached_property
    def counts(self) -> list[int]:
        """On the host."""
        return self.rows_per_expert_e.tolist()


def grouped_product(x_MI: Tensor, w_eIO: Tensor, groups: RowGroups) -> Tensor:
    """Each expert's rows times its matrix: (M, in) and (e, in, out) -> (M, out), in the dtype of autocast if it is
    on."""
    x_MI, w_eIO = cast_to_autocast(x_MI), cast_to_autocast(w_eIO)
    with without_autocast(x_MI):
        return _grouped_product(x_MI, w_eIO, groups)


def _grouped_product(x_MI: Tensor, w_eIO: Tensor, groups: RowGroups) -> Tensor:
    if _grouped_mm_runs(x_MI, w_eIO):
        if x_MI.stride() != (x_MI.shape[1], 1):  # it wants strides of 16 bytes, of a single row too
            x_MI = x_MI.clone(memory_format=torch.contiguous_format)
        if x_MI.device.type == "cuda" and w_eIO.requires_grad:
            w_eIO = _with_zeros_for_no_rows(w_eIO, groups.rows_per_expert_e)
        y_MO = F.grouped_mm(x_MI, w_eIO, offs=groups.ends_e)
        if y_MO.requires_grad:
            y_MO.register_hook(Tensor.contiguous)  # its backward refuses an expanded gradient, e.g. that of sum()
        return y_MO
    return _product_by_expert(x_MI, w_eIO, groups)


def _with_zeros_for_no_rows(w_eIO: Tensor, rows_per_expert_e: Tensor) -> Tensor:
    """``w_eIO``, whose gradient is 0 for experts without rows: CUDA's grouped_mm may leave it as the memory was
    (pytorch#172439, on capability 10)."""

    def zeros(grad_eIO: Tensor) -> Tensor:
        is_empty_e11 = (rows_per_expert_e == 0)[:, None, None]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return grad_eIO.masked_fill(is_empty_e11, 0.0)
        return grad_eIO.masked_fill_(is_empty_e11, 0.0)  # as large as the experts, and nobody else has it

    w_eIO = w_eIO.view_as(w_eIO)
    w_eIO.register_hook(zeros)
    return w_eIO


def _grouped_mm_runs(x_MI: Tensor, w_eIO: Tensor) -> bool:
    """grouped_mm needs some rows, widths that are a multiple of 16 bytes, and bfloat16; on CPU, where it is not
    compiled, it takes float16 and float32 too. On CUDA it needs capability 9 or 10: elsewhere torch copies the ends
    to the host, in each product."""
    everywhere, eager_on_cpu = (torch.bfloat16,), (torch.bfloat16, torch.float16, torch.float32)
    on_cpu = x_MI.device.type == "cpu" and not torch.compiler.is_compiling()
    dtypes = eager_on_cpu if on_cpu else everywhere
    widths = (w_eIO.shape[1] * w_eIO.itemsize, w_eIO.shape[2] * w_eIO.itemsize)
    fits = x_MI.dtype == w_eIO.dtype and x_MI.dtype in dtypes and not any(width % 16 for width in widths)
    return fits and len(x_MI) > 0 and len(w_eIO) > 0 and (x_MI.device.type != "cuda" or _is_grouped_on(x_MI.device))


def _is_grouped_on(device: torch.device) -> bool:
    """Whether a CUDA device multiplies groups in one kernel."""
    return torch.cuda.get_device_capability(device)[0] in GROUPED_ON


@uncompiled("other numbers of rows would be another graph")
def _product_by_expert(x_MI: Tensor, w_eIO: Tensor, groups: RowGroups) -> Tensor:
    if not len(w_eIO):
        # No experts, so no rows of any: a product that keeps both in the graph. FSDP2 leaves these weights alone, so
        # its mixed precision does not cast them as it casts the rows.
        return x_MI @ w_eIO.sum(0).to(x_MI.dtype)
    if not len(x_MI):  # no counts to read
        return x_MI @ w_eIO[0]
    *x_of_expert, unused_mI = x_MI.split([*groups.counts, len(x_MI) - sum(groups.counts)])
    products = [x_mI @ w_IO for x_mI, w_IO in zip(x_of_expert, w_eIO.unbind(0), strict=True)]
    return torch.cat([*products, unused_mI.new_zeros(len(unused_mI), w_eIO.shape[2])])


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases: the dense feed-forward layer, and the shared experts as one."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BlD: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(F.silu(self.gate(x_BlD)) * self.up(x_BlD))
