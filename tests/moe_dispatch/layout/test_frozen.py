"""Partition and TokenSharding are values: what frameworks do to arguments leaves them whole."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, dataclass, replace

import pytest
import torch
from torch.distributed.utils import _apply_to_tensors

from moe_dispatch import Partition, TokenSharding

WHOLE = TokenSharding(batch=Partition((2, 1)), seq=Partition((3, 2)), order="LB")
ZIGZAG = TokenSharding.zigzag(batch=2, length=7, ranks=2)
VALUES = [Partition((3, 0, 2)), WHOLE, WHOLE.select((2, 1)), ZIGZAG]


@dataclass(frozen=True)
class Holder:
    value: Partition | TokenSharding
    x: torch.Tensor


@pytest.mark.parametrize("value", VALUES, ids=["partition", "sharding", "selected", "zigzag"])
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_is_equal_in_all_that_follows_too(
    value: Partition | TokenSharding, again: Callable[[object], object]
) -> None:
    copied = again(value)
    names = [name for of in type(value).__mro__ for name in getattr(of, "__slots__", ())]
    assert copied == value
    assert hash(copied) == hash(value)
    assert {name: getattr(copied, name) for name in names} == {name: getattr(value, name) for name in names}


@pytest.mark.parametrize("value", VALUES, ids=["partition", "sharding", "selected", "zigzag"])
def test_what_casts_the_arguments_of_a_module_leaves_it_whole(value: Partition | TokenSharding) -> None:
    """FSDP does this to all arguments under mixed precision; it rebuilds dataclasses."""
    holder = Holder(value, torch.zeros(2))
    (cast,) = _apply_to_tensors(torch.Tensor.bfloat16, (holder,))
    assert cast.value is value
    assert cast.x.dtype == torch.bfloat16
    assert replace(holder).value is value
    assert asdict(holder)["value"] == value


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError, match="cannot assign to 'sizes' of a Partition; make another one"):
        VALUES[0].sizes = (1,)  # type: ignore[misc, union-attr]
    with pytest.raises(FrozenInstanceError, match="cannot delete 'seq' of a TokenSharding"):
        del WHOLE.seq


def test_other_kinds_are_not_equal() -> None:
    assert Partition((3,)) != (3,)
    assert TokenSharding(batch=1, seq=3) != Partition((3,))
    assert WHOLE.select((0, 1, 3, 2)) != WHOLE
