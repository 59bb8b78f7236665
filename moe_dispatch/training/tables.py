"""Ranks compare what they say of parameters, by name: a small exchange; where they differ, the first name."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import DisagreementError
from ..layout.on_device import copied_to
from ..wire.agreement import BAD, Statement, who_says_what
from ..wire.devices import device_of
from ..wire.exchange import exchange_rows

NO_SUCH = "no such name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What a rank says. Ranks of one scope have to have the same lines; their notes may differ.

    Attributes:
        lines: by name, in any order.
        note: what they only want to know whether it is the same.
        scope: names the ranks that are compared, e.g. by their numbers.
    """

    lines: Mapping[str, str]
    note: str = ""
    scope: str = ""

    @property
    def text(self) -> bytes:
        return json.dumps(dict(self.lines)).encode()


def facts_of(x: Tensor) -> str:
    """Shape and dtype, and of a parameter whether it is trained."""
    trained = (", trained" if x.requires_grad else ", frozen") if isinstance(x, nn.Parameter) else ""
    return f"{tuple(x.shape)} of {x.dtype}{trained}"


def long_digest(data: bytes) -> int:
    """63 bits, never negative: they differ where ``data`` does."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def compare_tables(tables: Sequence[Table], *, problem: str, remedy: str, group: dist.ProcessGroup) -> list[bool]:
    """Raise on every rank of ``group`` unless in each scope all say the same.

    One exchange of 32 bytes per table and pair of ranks, whatever the tables hold: nothing that a rank has wrong can
    break it. Only where they differ, the tables travel. On CUDA without a CPU backend the host waits for the words.

    Args:
        tables: as many on every rank.
        problem: what is wrong on this rank, raised on all; empty where nothing is.
        remedy: what to do about ranks that differ.

    Returns:
        For each table, whether the ranks of its scope have one note.

    Raises:
        RankMistakeError: a rank has a problem.
        DisagreementError: ranks of one scope say different things, with the first name about which they do.
    """
    texts, device = [table.text for table in tables], device_of(group)
    words = [
        word
        for table, text in zip(tables, texts, strict=True)
        for word in (
            long_digest(table.scope.encode()),
            BAD if problem else long_digest(text),
            long_digest(table.note.encode()),
            len(text),
        )
    ]
    words_PX4 = from_every_rank(torch.tensor(words, device="cpu"), [len(words)] * group.size(), device, group)
    words_PX4 = [mine.view(-1, 4).tolist() for mine in words_PX4]
    if any(digest == BAD for words_X4 in words_PX4 for _, digest, _, _ in words_X4):
        Statement("", problem).raise_on_every_rank(device=device, group=group)
    same_notes = []
    for i, text in enumerate(texts):
        scope_P, digest_P, note_P, length_P = zip(*(words_X4[i] for words_X4 in words_PX4), strict=True)
        pairs = set(zip(scope_P, digest_P, strict=True))
        if len(pairs) > len(set(scope_P)):  # every rank sees all scopes, so all come here
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            received = from_every_rank(data, length_P, device, group)
            lines = [json.loads(bytes(mine.tolist())) for mine in received]
            raise DisagreementError(f"{_first_difference(lines, scope_P)}; {remedy}")
        mine = scope_P[group.rank()]
        same_notes.append(len({note for scope, note in zip(scope_P, note_P, strict=True) if scope == mine}) == 1)
    return same_notes


def from_every_rank(
    x_N: Tensor, counts: Sequence[int], device: torch.device, group: dist.ProcessGroup
) -> list[Tensor]:
    """What each rank has, on the CPU, in rank order; ``counts`` says how much."""
    sent = [len(x_N)] * group.size()
    return list(
        exchange_rows(copied_to(x_N, device).repeat(group.size()), sent, counts, group).cpu().split(list(counts))
    )


def _first_difference(lines_P: Sequence[Mapping[str, str]], scope_P: Sequence[int]) -> str:
    """The first name about which ranks of one scope say different things, and who says what."""
    ranks_of_scope: dict[int, list[int]] = defaultdict(list)
    for rank, scope in enumerate(scope_P):
        ranks_of_scope[scope].append(rank)
    found: list[str] = []
    for ranks in ranks_of_scope.values():
        for name in dict.fromkeys(name for rank in ranks for name in lines_P[rank]):
            line_of_rank = {rank: lines_P[rank].get(name, NO_SUCH) for rank in ranks}
            if len(set(line_of_rank.values())) > 1:
                found.append(f"{name} is not the same on all ranks ({who_says_what(line_of_rank)})")
    more = f", and {len(found) - 1} more like it" if len(found) > 1 else ""
    return found[0] + more
