"""The default ``attend``: masks of another dtype, and what it computes in tiles."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sp_attention import scaled_dot_product
from sp_attention.attend import default
from sp_attention.attend.masks import MergedMask
from sp_attention.blocks.dropout import Dropout
from sp_attention.reference import reference_attention
from tests.support.compile import untraced
from tests.support.live import LiveBytes
from tests.support.tensors import TOLERANCE, difference


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


# ---- what CUDA computes, on whole tensors --------------------------------------------------------------

HALF, SINGLE = torch.bfloat16, torch.float32
OF_FOUR: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.linspace(-2, 2, 30, dtype=torch.float64).view(1, 1, 5, 6)},
    "window": {"window": (2, 0)},
    "sinks": {"sinks_n": torch.tensor([0.5, -1.0, 2.0, 0.0]).double()},
}


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "is_masked", "takes"),
    [
        ("cpu", SINGLE, (64, 32), True, True),
        ("cuda", HALF, (64, 64), False, True),
        ("cuda", torch.float16, (256, 256), False, True),
        ("cuda", HALF, (64, 64), True, False),
        ("cuda", SINGLE, (64, 64), False, False),
        ("cuda", HALF, (64, 32), False, False),
        ("cuda", HALF, (320, 320), False, False),
    ],
)
def test_groups_are_for_kernels_that_take_them(
    device: str, dtype: torch.dtype, widths: tuple[int, int], is_masked: bool, takes: bool
) -> None:
    assert default.takes_groups(device, dtype, widths, is_masked=is_masked) == takes


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", OF_FOUR)
def test_a_head_for_each_query_head_is_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, groups: int
) -> None:
    """Gradients too, which are those of the groups."""
    seen: list[tuple[int, ...]] = []
    attention = F.scaled_dot_product_attention

    def look(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.extend([k.shape, v.shape])
        return attention(q, k, v, **options)

    def none_takes(*_: object, is_masked: bool) -> bool:
        return False

    monkeypatch.setattr(default, "takes_groups", none_takes)
    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    draw = torch.Generator().manual_seed(0)
    shapes = ((5, 4, 6), (6, groups, 6), (6, groups, 4))
    whole = [torch.randn(2, *shape, generator=draw, dtype=torch.float64) for shape in shapes]
    grad = torch.randn(2, 5, 4, 4, generator=draw, dtype=torch.float64)
    options, of_reference = OF_FOUR[name], {key.replace("_n", "_N"): value for key, value in OF_FOUR[name].items()}
    answers = []
    for attend, given in ((scaled_dot_product, options), (reference_attention, of_reference)):
        leaves = [x.clone().requires_grad_() for x in whole]
        out = attend(*leaves, **given)
        answers.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert max(map(difference, *answers)) < TOLERANCE
    assert [shape[1] for shape in seen] == [4, 4] * (name != "sinks")


@pytest.mark.parametrize(
    ("bytes_per_pair", "options"),
    [
        (2.1, {"is_causal": True, "window": (50, -1)}),
        (4.1, {"key_padding_mask": torch.ones(2, 600, dtype=torch.bool)}),
        (3.1, {"attn_mask": torch.ones(1, 1, 500, 600, dtype=torch.bool)}),
        (10.1, {"attn_mask": torch.zeros(1, 1, 500, 600)}),
    ],
)
def test_masks_are_made_of_bools(bytes_per_pair: float, options: dict[str, Any]) -> None:
    """Bytes that are there at once, per pair of a query and a key: no ints of 8 bytes for each."""
    given = {"is_causal": False, "window": None, "attn_mask": None, "key_padding_mask": None} | options
    with LiveBytes() as live:
        mask = MergedMask.of((500, 600), like=torch.zeros(1), **given)
    assert live.most <= bytes_per_pair * 500 * 600
    assert mask.values.shape[-2:] == (500, 600)


# ---- long sequences, in tiles --------------------------------------------------------------------------

LONG: dict[str, dict[str, Any]] = {
    "window": {"window": (100, 3)},
    "causal window": {"window": (70, -1), "is_causal": True},
    "padding": {"key_padding_mask": torch.arange(620) < torch.tensor([[600], [90]]), "is_causal": True},
    "sinks": {"sinks_n": torch.tensor([0.5, -1.0, 2.0, 0.0]).double(), "is_causal": True},
    "dropout": {"dropout": Dropout(p=0.3, seed=torch.tensor(3), first_head=2)},
    "sinks and a mask": {
        "sinks_n": torch.zeros(4).double(),
        "attn_mask": torch.linspace(-3, 3, 560, dtype=torch.float64)[:, None].expand(1, 1, -1, 620),
    },
    "causal": {"is_causal": True},  # of 560 queries and 620 keys
}


class Called(TorchDispatchMode):
    """The names of our operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sp_attention":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def long_tensors() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((560, 4, 6), (620, 2, 6), (620, 2, 4), (560, 4, 4))
    return [torch.randn(2, *shape, generator=draw, dtype=torch.float64) for shape in shapes]


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("name", LONG)
def test_long_sequences_in_tiles_are_those_on_whole_tensors(name: str) -> None:
    """And both those of the reference, but for dropout, which it has no seed for."""
    answers = []
    for tile in (512, 10_000):
        leaves = [x.requires_grad_() for x in long_tensors()[:3]]
        with pytest.MonkeyPatch.context() as patch, Called() as called:
            patch.setattr(default, "TILE", tile)
            out = scaled_dot_product(*leaves, **LONG[name])
            answers.append([out.detach(), *torch.autograd.grad(out, leaves, long_tensors()[3])])
        assert bool(called.names) == (tile == 512)
    options: dict[str, Any] = {{"sinks_n": "sinks_N"}.get(key, key): value for key, value in LONG[name].items()}
    if name != "dropout":
        leaves = [x.requires_grad_() for x in long_tensors()[:3]]
        out = reference_attention(*leaves, **options)
        answers.append([out.detach(), *torch.autograd.grad(out, leaves, long_tensors()[3])])
    for other in answers[1:]:
        assert max(map(difference, other, answers[0])) < TOLERANCE


@pytest.mark.parametrize(
    ("length", "options", "in_tiles"),
    [
        (512, {"window": (3, 0)}, False),
        (513, {"window": (3, 0)}, True),
        (600, {}, False),
        (600, {"is_causal": True}, False),
        (600, {"attn_mask": torch.ones(1, 1, 600, 600, dtype=torch.bool)}, False),
    ],
)
def test_what_fits_in_a_tile_and_what_torch_can_is_no_tiles(length: int, options: Any, in_tiles: bool) -> None:
    x = torch.ones(1, length, 1, 8)
    with Called() as called:
        scaled_dot_product(x, x, x, **options)
    assert called.names == ["attend_pieces.default"] * in_tiles


@untraced()
def test_tiles_are_one_operator_of_a_graph() -> None:
    torch._dynamo.reset()
    answers = []
    for run in (scaled_dot_product, torch.compile(scaled_dot_product, fullgraph=True, backend="aot_eager")):
        leaves = [x.requires_grad_() for x in long_tensors()[:3]]
        sinks_n = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        out = run(*leaves, window=(30, 2), sinks_n=sinks_n)
        answers.append([out.detach(), *torch.autograd.grad(out, [*leaves, sinks_n], long_tensors()[3])])
    assert max(map(difference, *answers)) < TOLERANCE
