"""How expert ids travel in a plan: how wide they are, and so how large a message is.

A message to one rank is a word (``wire/agreement.py``) and then the ids of each token of the sender, in *steps* of 4
bytes. Ranks with another K, within the same step, still send what their peers expect, and are told apart by their
words instead of breaking the backend.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STEP = torch.int32  # of words and of ids; a message takes at most 2 K + 8 bytes for each token and rank
VECTOR_STEPS = 4
ID_DTYPES = (torch.int64, torch.int32)  # of ids as callers pass them
MOST_EXPERTS = 32766  # ids and "no expert" fit in an int16, which gloo carries as bytes
NO_EXPERT = -1


@dataclass(frozen=True, slots=True)
class IdFormat:
    """The width of ids on the wire.

    Attributes:
        dtype: of an id; "no expert" has all bits set, so it is -1 or 255.
        steps: of 4 bytes, that the ids of one token take.
        table_size: of a table by id. Its last entry is that of "no expert", which is read at -1 as at 255; and there
            is an entry for whatever a peer sends that believes in other experts.
    """

    dtype: torch.dtype
    steps: int
    table_size: int

    @classmethod
    def of(cls, num_choices: int, num_experts: int) -> "IdFormat":
        """One id takes one byte while "no expert" and ``num_experts`` ids fit in it, else two."""
        dtype = torch.uint8 if num_experts <= 255 else torch.int16
        return cls(dtype, -(-num_choices * dtype.itemsize // STEP.itemsize), torch.iinfo(dtype).max + 1)

    @property
    def ids_of_token(self) -> int:
        """How many ids the steps of a token have room for: K or a few more."""
        return self.steps * STEP.itemsize // self.dtype.itemsize

    def table(self, of_expert_E: Tensor, of_none: int) -> Tensor:
        """What belongs to each id, to be taken by ids of either sign: ``of_none`` for all but these experts."""
        table = of_expert_E.new_full((self.table_size,), of_none)
        table[: len(of_expert_E)] = of_expert_E
        return table

    def message_steps(self, tokens: int) -> int:
        """Steps of the message of a rank with this many tokens, its word included."""
        return 1 + tokens * self.steps

    def sent_steps(self, tokens: int, device_type: str) -> int:
        """The same as it is sent: on CUDA whole vectors of 16 bytes, so that every rank's message starts at one."""
        steps = self.message_steps(tokens)
        return -(-steps // VECTOR_STEPS) * VECTOR_STEPS if device_type == "cuda" else steps

    def message_bytes(self, tokens: int) -> int:
        """:meth:`message_steps` in bytes."""
        return STEP.itemsize * self.message_steps(tokens)
