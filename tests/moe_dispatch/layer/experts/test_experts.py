"""The experts against one row at a time in float64, on both of their paths."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch import GroupedExperts, SwiGLU
from moe_dispatch.layer import experts
from moe_dispatch.layer.experts import RowGroups, grouped_product

DIM, HIDDEN = 16, 24  # multiples of 16 bytes in every dtype
# Experts without rows: none, first, in the middle, last, all but one, all.
ROWS = [(3, 2, 4, 1), (0, 2, 4, 1), (3, 0, 0, 1), (3, 2, 4, 0), (0, 9, 0, 0), (0, 0, 0, 0)]
# Relative to the largest value. Measured: float32 6.5e-7, float16 1.6e-3, bfloat16 9e-3.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 6e-6, torch.float16: 1.6e-2, torch.bfloat16: 9e-2}


@pytest.fixture
def grouped_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each call of grouped_mm: a path that never runs proves nothing."""
    calls: list[torch.dtype] = []
    grouped_mm = F.grouped_mm

    def counted(x_MI: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x_MI.dtype)
        return grouped_mm(x_MI, *args, **kwargs)

    monkeypatch.setattr(F, "grouped_mm", counted)
    return calls


class Inputs:
    """Experts with rows and weights, the same for the same arguments."""

    def __init__(self, rows: Sequence[int], dtype: torch.dtype, dim: int = DIM, hidden: int = HIDDEN) -> None:
        torch.manual_seed(0)
        self.rows = tuple(rows)
        self.module = GroupedExperts(len(rows), dim, hidden).to(dtype)
        weight_dtype = torch.promote_types(dtype, torch.float32)
        self.x_MD = torch.randn(sum(rows), dim, dtype=torch.float64).to(dtype).requires_grad_()
        self.weight_M = torch.rand(sum(rows), dtype=torch.float64).to(weight_dtype).requires_grad_()
        self.pull_MD = torch.randn(sum(rows), dim, dtype=torch.float64).to(dtype)

    def widened(self) -> "Inputs":
        """The same numbers in float64."""
        self.module = self.module.double()
        self.x_MD = self.x_MD.detach().double().requires_grad_()
        self.weight_M = self.weight_M.detach().double().requires_grad_()
        self.pull_MD = self.pull_MD.double()
        return self

    def forward(self) -> Tensor:
        return self.module(self.x_MD, torch.tensor(self.rows), self.weight_M)

    def row_by_row(self) -> Tensor:
        """weight * down(silu(gate(x)) * up(x)), the weight on the output."""
        expert_of_row = [expert for expert, count in enumerate(self.rows) for _ in range(count)]
        outputs = []
        for x_D, weight, expert in zip(self.x_MD, self.weight_M, expert_of_row, strict=True):
            gate_F = x_D @ self.module.gate_eDF[expert]
            hidden_F = gate_F / (1 + torch.exp(-gate_F)) * (x_D @ self.module.up_eDF[expert])
            outputs.append(weight * (hidden_F @ self.module.down_eFD[expert]))
        zero = sum(tensor.sum() * 0 for tensor in (self.x_MD, self.weight_M, *self.module.parameters()))
        return torch.stack(outputs) + zero if outputs else self.x_MD * zero

    def outcome(self, y_MD: Tensor) -> dict[str, Tensor]:
        """The output and every gradient; a missing one fails here."""
        (y_MD * self.pull_MD).sum().backward()
        found = {"y_MD": y_MD.detach()}
        for name, tensor in (("x_MD", self.x_MD), ("weight_M", self.weight_M), *self.module.named_parameters()):
            assert tensor.grad is not None, f"{name} has no gradient"
            found[name] = tensor.grad
        return found


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape, name
        largest = max(1.0, want[name].abs().max().item()) if want[name].numel() else 1.0
        error = (got[name].double() - want[name].double()).abs()
        assert not error.numel() or error.max().item() <= tolerance * largest, (name, error.max().item() / largest)


# ---- both paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_grouped_mm_equals_float64(
    dtype: torch.dtype, rows: tuple[int, ...], grouped_calls: list[torch.dtype]
) -> None:
    inputs = Inputs(rows, dtype)
    got = inputs.outcome(inputs.forward())
    assert grouped_calls == [dtype] * 3 or not sum(rows)  # without any row either path will do
    assert got["y_MD"].dtype == dtype
    reference = Inputs(rows, dtype).widened()
    assert_close(got, reference.outcome(reference.row_by_row()), TOLERANCE[dtype])


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_loop_equals_float64(
    dtype: torch.dtype, rows: tuple[int, ...], grouped_calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype != torch.float64:
        monkeypatch.setattr(experts, "_grouped_mm_runs", lambda *_: False)
    inputs = Inputs(rows, dtype)
    got = inputs.outcome(inputs.forward())
    assert grouped_calls == []
    assert got["y_MD"].dtype == dtype
    reference = Inputs(rows, dtype).widened()
    assert_close(got, reference.outcome(reference.row_by_row()), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "dim", "hidden", "grouped"),
    [
        (torch.float32, 4, 8, True),
        (torch.float32, 4, 7, False),
        (torch.float32, 7, 8, False),
        (torch.float32, 1, 130, False),
        (torch.bfloat16, 8, 16, True),
        (torch.bfloat16, 8, 12, False),
        (torch.bfloat16, 4, 8, False),
        (torch.float16, 8, 130, False),
        (torch.float64, 4, 8, False),
    ],
)
def test_widths_that_are_no_multiple_of_16_bytes_take_the_loop(
    dtype: torch.dtype, dim: int, hidden: int, grouped: bool, grouped_calls: list[torch.dtype]
) -> None:
    inputs = Inputs((2, 0, 3), dtype, dim, hidden)
    got = inputs.outcome(inputs.forward())
    assert grouped_calls == [dtype] * 3 * grouped
    reference = Inputs((2, 0, 3), dtype, dim, hidden).widened()
    assert_close(got, reference.outcome(reference.row_by_row()), TOLERANCE[dtype])


# ---- experts without rows --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_expert_without_rows_has_a_zero_gradient(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    inputs = Inputs(rows, dtype)
    grads = inputs.outcome(inputs.forward())
    for name, parameter in inputs.module.named_parameters():
        assert grads[name].shape == parameter.shape
        for expert, count in enumerate(rows):
            assert (grads[name][expert].abs().max().item() > 0) == (count > 0), (name, expert)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_expanded_gradient_is_taken(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    inputs, reference = Inputs(rows, dtype), Inputs(rows, dtype).widened()
    inputs.forward().sum().backward()
    reference.row_by_row().sum().backward()
    for got, want in zip(inputs.module.parameters(), reference.module.parameters(), strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert_close({"grad": got.grad}, {"grad": want.grad}, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_rank_without_experts_stays_in_the_graph(dtype: torch.dtype, grouped_calls: list[torch.dtype]) -> None:
    inputs = Inputs((), dtype)
    y_MD = inputs.forward()
    assert grouped_calls == []
    assert y_MD.shape == (0, DIM)
    assert y_MD.dtype == dtype
    grads = inputs.outcome(y_MD)
    assert {name: tuple(grad.shape) for name, grad in grads.items()} == {
        "y_MD": (0, DIM),
        "x_MD": (0, DIM),
        "weight_M": (0,),
        "gate_eDF": (0, DIM, HIDDEN),
        "up_eDF": (0, DIM, HIDDEN),
        "down_eFD": (0, HIDDEN, DIM),
    }


# ---- rows and weights ------------------------------------------------------------------------------


def test_a_weighted_hidden_row_is_a_weighted_output() -> None:
    inputs = Inputs((3, 0, 2), torch.float64)
    counts_e = torch.tensor(inputs.rows)
    unweighted_MD = inputs.module(inputs.x_MD, counts_e, torch.ones_like(inputs.weight_M))
    want_MD = inputs.weight_M.unsqueeze(1) * unweighted_MD
    torch.testing.assert_close(inputs.forward(), want_MD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_are_not_rounded_before_they_multiply(dtype: torch.dtype) -> None:
    # Rows and matrices of powers of two: every product but the one with the weight is exact.
    module = GroupedExperts(1, 8, 8).to(dtype)
    with torch.no_grad():
        module.gate_eDF.copy_(torch.eye(8) * 32)  # silu(32) is 32 in every dtype here
        module.up_eDF.copy_(torch.eye(8))
        module.down_eFD.copy_(torch.eye(8) / 32)
    weight_M = torch.rand(64, generator=torch.Generator().manual_seed(3))
    y_MD = module(torch.ones(64, 8, dtype=dtype), torch.tensor([64]), weight_M)
    assert y_MD.dtype == dtype
    assert torch.equal(y_MD, weight_M.to(dtype).unsqueeze(1).expand(64, 8))
    triple_MD = module(torch.full((64, 8), 1.5, dtype=dtype), torch.tensor([64]), weight_M)
    # 1.5 -> silu(48) * 1.5 / 32 = 2.25; a weight that is rounded first gives other numbers
    assert torch.equal(triple_MD, (weight_M * 2.25).to(dtype).unsqueeze(1).expand(64, 8))
    assert not torch.equal(triple_MD[:, 0], weight_M.to(dtype) * 2.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_may_be_strided(dtype: torch.dtype) -> None:
    inputs = Inputs((3, 0, 2), dtype)
    want_MD = inputs.forward()
    views = {
        "a slice": F.pad(inputs.x_MD, (1, 0))[:, 1:],
        "every other column": inputs.x_MD.repeat_interleave(2, dim=1)[:, ::2],
        "transposed": inputs.x_MD.T.contiguous().T,
    }
    for name, view_MD in views.items():
        got_MD = inputs.module(view_MD, torch.tensor(inputs.rows), inputs.weight_M)
        torch.testing.assert_close(got_MD, want_MD, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=name)


def test_every_rows_expert_is_the_one_it_was_sorted_to() -> None:
    x_MI = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    w_eIO = torch.tensor([[[1.0, 0.0]], [[10.0, 0.0]], [[100.0, 1.0]]])
    y_MO = grouped_product(x_MI, w_eIO, RowGroups(torch.tensor([1, 0, 3])))
    assert y_MO.tolist() == [[1, 0], [200, 2], [300, 3], [400, 4]]


@pytest.mark.parametrize(
    ("num_rows", "num_weights", "counts", "text"),
    [
        (5, 5, (3, 2), "5 rows with 5 weights for 2 experts, but there are 3 experts here"),
        (5, 5, (3, 2, 0, 0), "5 rows with 5 weights for 4 experts, but there are 3 experts here"),
        (5, 4, (3, 2, 0), "5 rows with 4 weights for 3 experts, but there are 3 experts here"),
    ],
)
def test_counts_and_weights_that_do_not_fit_are_refused(
    num_rows: int, num_weights: int, counts: tuple[int, ...], text: str
) -> None:
    module = GroupedExperts(3, DIM, HIDDEN)
    text += "; pass the rows and weights of dispatch and the rows_per_expert_e of its plan"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        module(torch.ones(num_rows, DIM), torch.tensor(counts), torch.ones(num_weights))


# ---- parameters, SwiGLU ----------------------------------------------------------------------------


def test_parameters_at_the_start() -> None:
    torch.manual_seed(0)
    module = GroupedExperts(4, 64, 256)
    assert {name: tuple(parameter.shape) for name, parameter in module.named_parameters()} == {
        "gate_eDF": (4, 64, 256),
        "up_eDF": (4, 64, 256),
        "down_eFD": (4, 256, 64),
    }
    assert module.gate_eDF.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert module.up_eDF.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert module.down_eFD.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert repr(module) == "GroupedExperts(num_experts=4, dim=64, hidden=256)"


def test_swiglu_is_one_expert_for_every_token() -> None:
    inputs = Inputs((6,), torch.float64)
    shared = SwiGLU(DIM, HIDDEN).double()
    with torch.no_grad():
        for linear, matrix_eIO in zip((shared.gate, shared.up, shared.down), inputs.module.parameters(), strict=True):
            linear.weight.copy_(matrix_eIO[0].T)
    with torch.no_grad():
        inputs.weight_M.fill_(1.0)
    y_BLD = shared(inputs.x_MD.view(2, 3, DIM))
    torch.testing.assert_close(y_BLD.flatten(0, 1), inputs.row_by_row(), rtol=1e-12, atol=1e-12)
    assert set(shared.state_dict()) == {"gate.weight", "up.weight", "down.weight"}


# ---- autocast ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "hidden"), [(DIM, HIDDEN), (7, 9)])
@pytest.mark.parametrize("rows", [(3, 2, 4, 1), (0, 0, 0, 0), ()])
def test_autocast_multiplies_in_its_dtype_whatever_the_widths_and_rows(
    rows: tuple[int, ...], dim: int, hidden: int
) -> None:
    inputs, low = Inputs(rows, torch.float32, dim, hidden), Inputs(rows, torch.float32, dim, hidden)
    low.module.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_MD = inputs.forward()
    assert y_MD.dtype == torch.float32  # of the rows, on a rank without experts too: combine sends them
    with torch.no_grad():
        groups = RowGroups(torch.tensor(rows, dtype=torch.int64))
        x_MD = low.x_MD.bfloat16()
        gate_MF, up_MF = (grouped_product(x_MD, w, groups) for w in (low.module.gate_eDF, low.module.up_eDF))
        hidden_MF = (F.silu(gate_MF) * up_MF * low.weight_M.unsqueeze(1)).bfloat16()
        wanted_MD = grouped_product(hidden_MF, low.module.down_eFD, groups)
    assert torch.equal(y_MD, wanted_MD.float())
    y_MD.sum().backward()
    assert all(parameter.grad is not None for parameter in inputs.module.parameters())


def test_counts_are_read_once_however_many_products(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: (reads.append(x.shape), tolist(x))[1])
    Inputs((3, 2), torch.float64).forward()
    assert len(reads) == 1
