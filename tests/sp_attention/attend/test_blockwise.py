"""blockwise_attend against the reference, pair by pair, and what torch's kernels would get wrong by themselves."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sp_attention import blockwise_attend, scaled_dot_product
from sp_attention.blocks import operators
from sp_attention.blocks.dropout import Dropout
from sp_attention.reference import reference_attention
from tests.support.attention.case import Case, named_case
from tests.support.attention.masks import CROSS, KINDS, PACKED
from tests.support.attention.one_process import whole_in_one_process
from tests.support.attention.whole import Whole, whole_answer
from tests.support.ranks import refusal
from tests.support.tensors import TOLERANCE, difference, grad_of, leaf

pytestmark = pytest.mark.usefixtures("uncovered")


def case_of(kind: str, lengths: tuple[int, int], heads: tuple[int, int], widths: tuple[int, int], seed: int) -> Case:
    batch = 1 if kind in PACKED else 2
    case = named_case(1, kind, (lengths[0],), batch=batch, kv_seq=(lengths[1],), num_heads=heads, widths=widths)
    return replace(case, seed=seed)


def differences(case: Case, chunk: int) -> list[str]:
    whole = Whole.of(case, torch.float64)
    wanted = whole_answer(reference_attention, whole)
    got = whole_answer(whole_in_one_process(blockwise_attend(chunk=chunk)), whole)
    by = {name: difference(got[name], wanted[name]) for name in wanted}
    return [f"{name} by {by[name]:.1e}, chunk {chunk}: {case}" for name in by if not by[name] <= TOLERANCE]


def lengths_of(kind: str, square: int) -> tuple[int, int]:
    return (square, square + 5) if kind in CROSS else (square, square)


def swapped(lengths: tuple[int, int]) -> tuple[int, int]:
    return lengths[1], lengths[0]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_reference(kind: str) -> None:
    """Output and every gradient, in float64. Measured over the sweep: 1.2e-14 at most."""
    failures = differences(case_of(kind, lengths_of(kind, 11), (4, 2), (6, 4), 1), 4)
    failures += differences(case_of(kind, lengths_of(kind, 7), (3, 3), (4, 6), 2), 1)
    failures += differences(case_of(kind, swapped(lengths_of(kind, 11)), (4, 1), (6, 6), 3), 16)
    assert failures == []


@pytest.mark.sweep
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_reference_for_every_size(kind: str, chunk: int) -> None:
    squares = [(n, n) for n in (1, 2, 7, 16, 67)]
    lengths = [(7, 12), (67, 29), (29, 67), (1, 5), (5, 1)] if kind in CROSS else squares
    sizes = product(lengths, [(4, 2), (3, 3), (4, 1), (1, 1)], [(6, 4), (4, 6), (64, 64)])
    cases = [case_of(kind, *size, seed) for seed, size in enumerate(sizes)]
    assert [failure for case in cases for failure in differences(case, chunk)] == []


@pytest.mark.parametrize("chunk", [3, 100])
def test_dropout_drops_what_the_default_drops(chunk: int) -> None:
    """With the places and heads of a document and of a rank."""
    dropout = Dropout(p=0.4, seed=torch.tensor(11), first_head=3, first_query=5, first_key=5)
    whole = Whole.of(case_of("causal", (9, 9), (4, 2), (6, 4), 0), torch.float64)
    tensors = whole.q_BLNH, whole.k_BLGH, whole.v_BLGH
    keep_BNLL = dropout.keep(torch.empty(2, 4, 9, 9))
    answers = []
    for run, options in (
        (blockwise_attend(chunk=chunk), {"dropout": dropout}),
        (reference_attention, {"keep_BNLL": keep_BNLL, "dropout_p": 0.4}),
    ):
        leaves = [leaf(x) for x in tensors]
        out = run(*leaves, is_causal=True, **options)
        answers.append([out.detach(), *torch.autograd.grad(out, leaves, whole.grad_BLNH)])
    assert max(difference(got, wanted) for got, wanted in zip(*answers, strict=True)) < TOLERANCE


# Of the output, and of gradients.
BOUNDS = {torch.float32: (1.4e-6, 1.6e-6), torch.bfloat16: (0.0082, 0.0115), torch.float16: (0.0011, 0.0012)}


@pytest.mark.parametrize("kind", ["causal", "window", "holes", "float (BNLL)", "sinks and mask"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_lower_precision(dtype: torch.dtype, kind: str) -> None:
    """The bounds are twice what was measured, over 7 tiles per query."""
    whole = Whole.of(case_of(kind, (200, 200), (4, 2), (64, 64), 0), dtype)
    tensors = {name: getattr(whole, name).double() for name in ("q_BLNH", "k_BLGH", "v_BLGH", "grad_BLNH")}
    options = {name: whole.options[name].double() for name in whole.learned}
    exact = replace(whole, **tensors, options=whole.options | options)
    wanted = whole_answer(reference_attention, exact)
    got = whole_answer(whole_in_one_process(blockwise_attend(chunk=32)), whole)
    by = {name: difference(got[name].double(), wanted[name]) for name in ("out", "dq", "dk", "dv")}
    assert by["out"] <= BOUNDS[dtype][0]
    assert max(by.values()) <= BOUNDS[dtype][1]


# ---- what kernels of torch get wrong or die of ---------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [(2, 0, 4, 2, 5), (2, 3, 4, 2, 0), (2, 3, 0, 0, 5), (0, 3, 4, 2, 5), (0, 0, 0, 0, 0)], ids=str
)
def test_nothing_to_attend(sizes: tuple[int, ...]) -> None:
    """No queries, keys, heads or rows: torch's kernel for the CPU ends the process."""
    batch, queries, heads, groups, keys = sizes
    shapes = ((queries, heads, 6), (keys, groups, 6), (keys, groups, 4))
    leaves = [torch.ones(batch, *shape).requires_grad_() for shape in shapes]
    sinks_n = torch.ones(heads).requires_grad_()
    out = blockwise_attend()(*leaves, is_causal=True, sinks_n=sinks_n)
    assert out.shape == (batch, queries, heads, 4)
    grads = torch.autograd.grad(out.sum(), [*leaves, sinks_n])
    assert not any(bool(x.any()) for x in (out, *grads))


def test_the_log_that_torch_gives_a_closed_row_is_0() -> None:
    """Why a tile has to say which rows it closes. If torch says -inf one day, that may go."""
    mask = torch.zeros(1, 1, 2, 3)
    mask[0, 0, 1] = -torch.inf
    tensors = [torch.ones(1, 1, n, 8) for n in (2, 3, 3)]
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, attn_mask=mask)
    assert lse[0, 0, 1] == 0


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_that_padding_and_causal_close_together(is_causal: bool) -> None:
    """The first tile closes some rows that later tiles open, and some that none does."""
    whole = Whole.of(case_of("none", (12, 12), (2, 2), (6, 6), 0), torch.float64)
    options = {"key_padding_mask": torch.arange(12) >= torch.tensor([[5], [11]]), "is_causal": is_causal}
    whole = replace(whole, options=options)
    wanted, got = (whole_answer(run, whole) for run in (reference_attention, blockwise_attend(chunk=4)))
    assert max(difference(got[name], wanted[name]) for name in wanted) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"attn_mask": torch.arange(49).view(1, 1, 7, 7) % 3 > 0}], ids=["", "mask"])
def test_tensors_that_are_not_dense(options: dict[str, Any]) -> None:
    """torch's kernel reads a last dimension of another stride as if it were dense."""
    draw = torch.Generator().manual_seed(0)
    dense = [torch.randn(2, 7, 2, 8, generator=draw, dtype=torch.float64) for _ in "qkvg"]
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in dense]
    answers = []
    for tensors in (dense, strided):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = blockwise_attend(chunk=4)(*leaves, **options)
        answers.append([out, *torch.autograd.grad(out, leaves, tensors[3])])
    assert all(torch.equal(x, y) for x, y in zip(*answers, strict=True))


def test_a_gradient_of_nan_where_nothing_is_attended_to() -> None:
    """As padding may have: it is in no other gradient, that of the sinks included."""
    leaves = [torch.ones(1, 4, 2, 8).requires_grad_() for _ in "qkv"] + [torch.zeros(2).requires_grad_()]
    mask = torch.tensor([True, False, True, True])[None, None, :, None].expand(1, 1, 4, 4)
    grad = torch.ones(1, 4, 2, 8)
    grad[:, 1] = torch.nan
    out = blockwise_attend(chunk=2)(*leaves[:3], attn_mask=mask, sinks_n=leaves[3])
    grads = torch.autograd.grad(out, leaves, grad)
    assert all(bool(x.isfinite().all()) for x in grads)
    assert not grads[0][:, 1].any()


# ---- memory --------------------------------------------------------------------------------------------


class LargestInside(TorchDispatchMode):
    """Elements of the largest tensor that any operation made, those inside of our operators included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = torch.ops.sp_attention
        inside = {
            ours.attend_pieces.default: operators.attend_pieces,
            ours.attend_pieces_backward.default: operators.attend_pieces_backward,
        }
        if func in inside:
            with self:
                return inside[func](*args)
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@contextmanager
def largest_inside() -> Iterator[LargestInside]:
    with LargestInside() as largest:
        yield largest


LARGE: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "other lengths": {"is_causal": True},
    "window": {"window": (100, 20)},
    "sinks": {"sinks_n": torch.zeros(2)},
    "dropout": {"dropout": Dropout(p=0.1)},
    "padding": {"key_padding_mask": torch.arange(512)[None] % 3 > 0, "is_causal": True},
}


@pytest.mark.parametrize("name", LARGE)
def test_no_tensor_has_queries_times_keys(name: str) -> None:
    """The largest is a tensor of all queries, or a tile."""
    length, width, chunk = 512, 8, 32
    queries = length // 2 if name == "other lengths" else length
    shapes = ((1, queries, 2, width), (1, length, 1, width), (1, length, 1, width))
    leaves = [torch.ones(shape).requires_grad_() for shape in shapes]
    with largest_inside() as largest:
        out = blockwise_attend(chunk=chunk)(*leaves, **LARGE[name])
        torch.autograd.grad(out.sum(), leaves)
    assert largest.numel <= max(length * 2 * width, 4 * chunk * chunk) < length * length // 16
    with largest_inside() as whole:
        torch.autograd.grad(blockwise_attend(chunk=512)(*leaves, **LARGE["dropout"]).sum(), leaves)
    assert whole.numel >= queries * length  # it would be seen


@pytest.mark.parametrize("name", ["window", "sinks", "padding"])
def test_nor_has_the_default(name: str) -> None:
    """Its tiles are 512 x 512."""
    length, options = 1600, dict(LARGE[name])
    if name == "padding":
        options["key_padding_mask"] = torch.arange(length)[None] % 3 > 0
    leaves = [torch.ones(1, length, heads, 8).requires_grad_() for heads in (2, 1, 1)]
    with largest_inside() as largest:
        torch.autograd.grad(scaled_dot_product(*leaves, **options).sum(), leaves)
    assert largest.numel <= 2 * 512 * 512 < length * length // 4


# ---- what users put around it --------------------------------------------------------------------------


def answer(attend: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 7, 2, 8, generator=draw).to(dtype).requires_grad_() for _ in "qkv"]
    out = attend(*leaves, is_causal=True, sinks_n=torch.zeros(2))
    out.float().square().sum().backward()
    return [out.detach(), *map(grad_of, leaves)]


def same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_autocast_casts_q_k_and_v_and_nothing_more() -> None:
    attend = blockwise_attend(chunk=3)

    def in_autocast(*tensors: Tensor, **options: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(*tensors, **options)

    got, wanted = answer(in_autocast), answer(attend, torch.bfloat16)
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == torch.float32
    draw = torch.Generator().manual_seed(0)
    dropped = [torch.randn(1, 7, 2, 8, generator=draw) for _ in "qkv"]
    assert torch.equal(got[0], wanted[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the plain kernel multiplies in float32
        inside = attend(*(x.bfloat16() for x in dropped), dropout=Dropout(p=0.5))
    assert torch.equal(inside, attend(*(x.bfloat16() for x in dropped), dropout=Dropout(p=0.5)))


def checkpointed(attend: Any, use_reentrant: bool) -> Any:
    return lambda *x, **options: checkpoint(partial(attend, **options), *x, use_reentrant=use_reentrant)


def test_copies_checkpoints_and_inference() -> None:
    attend = blockwise_attend(chunk=3)
    wanted = answer(attend)
    for each in (copy.deepcopy(attend), pickle.loads(pickle.dumps(attend))):
        assert same(answer(each), wanted)
    for use_reentrant in (False, True):
        assert same(answer(checkpointed(attend, use_reentrant)), wanted)
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        tensors = [torch.randn(1, 7, 2, 8, generator=draw) for _ in "qkv"]
        assert torch.equal(attend(*tensors, is_causal=True, sinks_n=torch.zeros(2)), wanted[0])


def test_there_is_no_second_derivative() -> None:
    x = torch.ones(1, 3, 1, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(blockwise_attend()(x, x, x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention in blocks has no second derivative; for gradients of"):
        grad.sum().backward()


@pytest.mark.parametrize("chunk", [0, -3, 1.5, True, None, "512"])
def test_a_chunk_that_cannot_be(chunk: Any) -> None:
    assert refusal(lambda: blockwise_attend(chunk=chunk)) == (
        f"chunk is {chunk!r}; it is how many queries and how many keys are computed at once, an int of at least 1: "
        "pass e.g. 512"
    )


def test_a_chunk_beyond_all_lengths() -> None:
    assert same(answer(blockwise_attend(chunk=10**30)), answer(blockwise_attend()))
