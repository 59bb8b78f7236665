"""Dropout whose pattern does not depend on who computes it.

The seed is drawn here and used here. Between, the ranks have to get the same one: that of the group's first rank goes
with the queries, in a header that their exchange has anyway (call/words.py).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

NUM_SEEDS = 2**63 - 1


def draw_seed(device: torch.device) -> Tensor:
    """() int64 from the random state of this process. No copy from the host: it would wait for it in every layer."""
    return torch.randint(NUM_SEEDS, (), dtype=torch.int64, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """Which weights are dropped is a function of (seed, row, head, query, key) alone, so of no rank and no layout.

    Attributes:
        p: the fraction dropped.
        seed: int64, () on any device.
        first_head: global number of the first head at hand.
        first_query, first_key: places of the first query and key at hand, in their sequences.
    """

    p: float
    seed: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64, device="cpu"), repr=False)
    first_head: int = 0
    first_query: int = 0
    first_key: int = 0

    def of_heads(self, first: int) -> "Dropout":
        """Of the heads at hand from ``first`` on."""
        return replace(self, first_head=self.first_head + first)

    def at(self, query: int, key: int) -> "Dropout":
        """Of the queries and keys at hand from these on."""
        return replace(self, first_query=self.first_query + query, first_key=self.first_key + key)

    def apply(self, weights_BnLL: Tensor) -> Tensor:
        """(B, n, Lq, Lk) weights, with some dropped and the others scaled by 1 / (1 - p)."""
        return weights_BnLL.masked_fill(~self.keep(weights_BnLL), 0.0) / (1 - self.p)

    def keep(self, like_BnLL: Tensor) -> Tensor:
        """(B, n, Lq, Lk) bool, True where a weight stays."""
        code = self.seed.to(like_BnLL.device)
        starts = (0, self.first_head, self.first_query, self.first_key)
        for dim, start in enumerate(starts):
            index = torch.arange(start, start + like_BnLL.shape[dim], device=like_BnLL.device)
            code = mix(code.unsqueeze(-1) + index)
        return (code >> 11) & (2**53 - 1) >= int(self.p * 2**53)


def mix(code: Tensor) -> Tensor:
    """A 64-bit finaliser on int64 (Stafford's variant 13, as SplitMix64 uses it): each input bit moves each output
    bit."""
    code = code * -7046029254386353131  # 0x9E3779B97F4A7C15, to spread consecutive indices
    code = (code ^ _shift(code, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    code = (code ^ _shift(code, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return code ^ _shift(code, 31)


def _shift(code: Tensor, bits: int) -> Tensor:
    """Logical shift right: int64's own keeps the sign."""
    return (code >> bits) & ((1 << (64 - bits)) - 1)
