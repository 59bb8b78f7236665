"""Kernels of a tile, over pieces of keys that are tensors of their own, as they come from other ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sp_attention.blocks import cuda, kernels
from sp_attention.blocks.dropout import Dropout
from sp_attention.blocks.kernels import kernel_for
from sp_attention.blocks.pieces import Piece
from sp_attention.blocks.tile import Options, Tile, beyond, closed_as_inf
from sp_attention.blocks.walk import Attended, Gradients, add_attention, add_gradients
from sp_attention.reference import reference_attention
from tests.support.tensors import TOLERANCE, difference

LENGTH, NUM_KEYS = 9, 12
CUTS = (0, 4, 5, 12)  # of the keys
PADDING_BL = torch.arange(NUM_KEYS) != torch.tensor([[3], [4]])
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"window": (3, 1)},
    "padding": {"key_padding_mask": PADDING_BL},
    "padding and causal": {"key_padding_mask": PADDING_BL, "is_causal": True},
    "bias": {"attn_mask": torch.linspace(-2, 2, 4 * LENGTH * NUM_KEYS, dtype=torch.float64).view(1, 4, LENGTH, -1)},
    "closed": {"attn_mask": torch.arange(LENGTH * NUM_KEYS).view(1, 1, LENGTH, NUM_KEYS) % 5 > 2},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Queries, and keys and values in parts with the piece that says who sees them."""

    q_BLnH: Tensor
    parts: list[tuple[Tensor, Tensor, Piece]]
    options: Options

    @property
    def calls(self) -> list[tuple[tuple[Tensor, Tensor, Tensor], list[Piece]]]:
        return [((self.q_BLnH, k, v), [piece]) for k, v, piece in self.parts]


def tensors() -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((LENGTH, 4, 6), (NUM_KEYS, 2, 6), (NUM_KEYS, 2, 5), (LENGTH, 4, 5))
    return [torch.randn(2, *shape, generator=draw, dtype=torch.float64) for shape in shapes]


def in_parts(name: str, chunk: int) -> Parts:
    masks = dict(MASKS[name])
    left, right = masks.pop("window", (-1, -1))
    right = 0 if masks.pop("is_causal", False) else right
    q, k, v, _ = tensors()
    ahead, far = NUM_KEYS - LENGTH, 100
    parts = []
    for start, end in pairwise(CUTS):
        low, high = (ahead - left if left >= 0 else -far) - start, (ahead + right if right >= 0 else far) - start
        piece = Piece(0, LENGTH, 0, end - start, low, high, 0, start)
        parts.append((k[:, start:end].clone(), v[:, start:end].clone(), piece))
    options = Options(
        scale=6**-0.5,
        attn_mask=masks.get("attn_mask"),
        key_padding_mask=masks.get("key_padding_mask"),
        dropout=None,
        chunk=chunk,
    )
    return Parts(q_BLnH=q, parts=parts, options=options)


def attended(whole: Parts) -> tuple[Tensor, Tensor]:
    out_BLnH, lse_BnL = torch.zeros(2, LENGTH, 4, 5).double(), torch.full((2, 4, LENGTH), -torch.inf).double()
    for qkv, pieces in whole.calls:
        add_attention(out_BLnH, lse_BnL, qkv, pieces, whole.options)
    return out_BLnH, lse_BnL


def gradients(whole: Parts, out_BLnH: Tensor, lse_BnL: Tensor, mask_BnLL: Tensor | None) -> list[Tensor]:
    """Of q, k and v: each part's alone, given what is known of all keys."""
    known = Attended(grad_BLnH=tensors()[3], out_BLnH=out_BLnH, lse_BnL=lse_BnL, closed_BnL=lse_BnL == -torch.inf)
    dq, of_k, of_v = torch.zeros_like(whole.q_BLnH), [], []
    for (q, k, v), pieces in whole.calls:
        grads = Gradients(q_BLnH=dq, k_BLgH=torch.zeros_like(k), v_BLgH=torch.zeros_like(v), mask_BnLL=mask_BnLL)
        add_gradients(grads, known, (q, k, v), pieces, whole.options)
        of_k.append(grads.k_BLgH)
        of_v.append(grads.v_BLgH)
    return [dq, torch.cat(of_k, dim=1), torch.cat(of_v, dim=1)]


@pytest.fixture(params=["flash", "plain"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(kernels, "_cpu_flash", kernels._plain)
    return request.param


@pytest.mark.parametrize("chunk", [2, 5, 100])
@pytest.mark.parametrize("name", MASKS)
def test_parts_of_the_keys_make_the_whole(name: str, chunk: int, kernel: str) -> None:
    """Gradients go part by part from the output and the log of the sum over all."""
    options = dict(MASKS[name])
    leaves = [x.requires_grad_() for x in tensors()[:3]]
    wanted = reference_attention(*leaves, **options)
    wanted_grads = torch.autograd.grad(wanted, leaves, tensors()[3])
    out_BLnH, lse_BnL = attended(in_parts(name, chunk))
    got = [out_BLnH, *gradients(in_parts(name, chunk), out_BLnH, lse_BnL, None)]
    for x, y in zip(got, (wanted.detach(), *wanted_grads), strict=True):
        assert difference(x, y) < TOLERANCE


def test_the_gradient_of_a_mask_goes_to_its_places() -> None:
    whole = in_parts("bias", 5)
    bias = MASKS["bias"]["attn_mask"].clone().requires_grad_()
    wanted = reference_attention(*tensors()[:3], attn_mask=bias)
    (wanted_grad,) = torch.autograd.grad(wanted, bias, tensors()[3])
    mask_BnLL = torch.zeros(1, 4, LENGTH, NUM_KEYS, dtype=torch.float64)
    gradients(whole, *attended(whole), mask_BnLL)
    assert difference(mask_BnLL, wanted_grad) < TOLERANCE


def test_the_kernel_is_the_fastest_that_can() -> None:
    q_BLnH = torch.zeros(1, 2, 2, 4)
    plain, dropped = (
        Options(scale=1.0, attn_mask=None, key_padding_mask=None, dropout=dropout, chunk=4)
        for dropout in (None, Dropout(p=0.5))
    )
    assert "_cpu_flash" in kernel_for(q_BLnH, plain, False).backward.__qualname__
    assert "_plain" in kernel_for(q_BLnH, plain, True).backward.__qualname__
    assert "_plain" in kernel_for(q_BLnH, dropped, False).backward.__qualname__
    assert "_plain" in kernel_for(q_BLnH.to("meta"), plain, False).backward.__qualname__


# ---- masks of a tile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_closed_pairs_are_minus_infinity(dtype: torch.dtype) -> None:
    keep = torch.tensor([[True, False], [False, False]])
    wanted = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]], dtype=dtype)
    assert torch.equal(closed_as_inf(keep, torch.zeros((), dtype=dtype)), wanted)


@pytest.mark.parametrize("edges", [(-1, 1), (-100, 0), (0, 100), (-6, 2), (3, 3), (-100, 100)])
def test_what_is_beyond_the_edges_is_closed(edges: tuple[int, int]) -> None:
    piece = Piece(0, 4, 0, 6, *edges, 0, 0)
    distance = torch.arange(6) - torch.arange(4)[:, None]
    wanted = torch.zeros(4, 6).masked_fill((distance < edges[0]) | (distance > edges[1]), -torch.inf)
    assert torch.equal(beyond(piece, torch.zeros(())), wanted[None, None])


# ---- on CUDA: signatures only --------------------------------------------------------------------------

Forward = Callable[[Tile], tuple[Tensor, Tensor]]
Backward = Callable[[Tile, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@pytest.mark.parametrize(
    ("forward", "backward", "has_mask"),
    [
        (cuda.flash_forward, cuda.flash_backward, False),
        (cuda.efficient_forward, cuda.efficient_backward, False),
        (cuda.efficient_forward, cuda.efficient_backward, True),
    ],
)
def test_kernels_for_cuda_have_the_shapes_of_torchs(forward: Forward, backward: Backward, has_mask: bool) -> None:
    """On meta tensors. Nothing here says that the numbers are right."""
    q, k, v = (
        torch.empty(2, n, length, 8, dtype=torch.float16, device="meta") for n, length in ((4, 5), (2, 7), (2, 7))
    )
    piece = Piece(0, 5, 0, 7, -1, 3, 0, 0)
    tile = Tile(
        piece=piece,
        q_BnLH=q,
        k_BgLH=k,
        v_BgLH=v,
        added=beyond(piece, q) if has_mask else None,
        scale=0.3,
        dropout=None,
    )
    out_BnLH, lse_BnL = forward(tile)
    assert (out_BnLH.shape, out_BnLH.dtype) == (q.shape, q.dtype)
    assert (lse_BnL.shape, lse_BnL.dtype) == ((2, 4, 5), torch.float32)
    grads = backward(tile, q, out_BnLH, lse_BnL)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("sides", [(-1, -1), (-1, 0), (2, 0), (3, 1), (0, 2), (-1, 2), (1, -1)])
@pytest.mark.parametrize("lengths", [(5, 5), (3, 8), (8, 3)])
def test_windows_of_flash_say_what_a_piece_says(lengths: tuple[int, int], sides: tuple[int, int]) -> None:
    """Flash counts from the end: query i sees the keys from i + Lk - Lq - left to i + Lk - Lq + right."""
    whole = Piece.whole(lengths, sides)
    for cut in ((0, lengths[0], 0, lengths[1]), (1, 2, 0, 2), (1, 2, 1, lengths[1] - 1), (0, 3, 2, 1)):
        piece = whole.part(*cut)
        if piece.is_empty:
            continue
        empty = torch.empty(0)
        tile = Tile(piece=piece, q_BnLH=empty, k_BgLH=empty, v_BgLH=empty, added=None, scale=1.0, dropout=None)
        left, right = cuda._window(tile)
        assert left is None or left >= 0
        assert right is None or right >= 0
        for query in range(piece.queries):
            for key in range(piece.keys):
                distance = key - query - (piece.keys - piece.queries)
                by_flash = (left is None or distance >= -left) and (right is None or distance <= right)
                assert by_flash == (piece.low <= key - query <= piece.high)
