"""What a layout says of the sequence: who holds which places, and how far that is in order."""

from typing import Any

import pytest
import torch

from moe_dispatch.testing import Layout
from tests.support.ranks import refusal


@pytest.mark.parametrize(
    ("of_layout", "places", "in_order"),
    [
        ({}, [[0, 1, 2], [3, 4], [5, 6]], 7),
        ({"lengths": (0, 6, 1)}, [[], [0, 1, 2, 3, 4, 5], [6]], 7),
        ({"order": "zigzag"}, [[0, 1, 6], [2, 5], [3, 4]], 2),
        ({"order": "striped", "stripe": 2}, [[0, 1, 6], [2, 3], [4, 5]], 2),
        ({"order": "striped"}, [[0, 3, 6], [1, 4], [2, 5]], 1),
        ({"order": "striped", "stripe": 4}, [[0, 1, 2, 3], [4, 5, 6], []], 7),
        ({"order": "zigzag", "seq": 3}, [[0], [1], [2]], 3),
        ({"order": "zigzag", "sp": 1}, [[0, 1, 2, 3, 4, 5, 6]], 7),
    ],
)
def test_places_over_sp(of_layout: dict[str, Any], places: list[list[int]], in_order: int) -> None:
    layout = Layout(**{"batch": 2, "seq": 7, "sp": 3, **of_layout})
    sharding = layout.sharding
    place_BL = torch.arange(layout.seq).expand(layout.shape)
    assert [sharding.shard(place_BL, rank)[1].tolist() for rank in range(layout.sp)] == places
    assert layout.places_in_order == in_order


def test_an_order_that_cannot_be_is_refused() -> None:
    told = refusal(lambda: Layout(batch=1, seq=3, sp=3, order="zigzig").sharding)
    assert told == "order is 'zigzig'; it has to be one of 'contiguous', 'zigzag', 'striped'"
    told = refusal(lambda: Layout(batch=1, seq=3, sp=2, lengths=(1, 2), order="zigzag").sharding)
    assert told.startswith("lengths are (1, 2) and the order is 'zigzag', which has lengths of its own; leave out")
