"""From what each rank recorded to what all of them did."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import DisagreementError
from ..wire.agreement import who_says_what
from ..wire.devices import device_of
from ..wire.exchange import check_is_group, exchange_rows
from .choices import ID_DTYPE, Choices, together

TOKEN_BYTES = torch.int64.itemsize


def gather_choices(layers: Mapping[str, Sequence[Choices]], group: dist.ProcessGroup) -> dict[str, list[Choices]]:
    """See :meth:`RoutingRecord.gather`. After the headers every rank knows the size of every message, so what is
    wrong is the same error everywhere, and nobody waits."""
    check_is_group(group)
    mine = {name: [_header(x) for x in forwards] for name, forwards in layers.items()}
    headers = [json.loads(text) for text in _texts(json.dumps(mine), group)]
    names = list(dict.fromkeys(name for header in headers for name in header))
    forwards_of_name = {name: _agreed(name, headers) for name in names}
    found: dict[str, list[Choices]] = {}
    token_N = torch.empty(0, dtype=torch.int64, device="cpu")
    for name, forwards in forwards_of_name.items():
        found[name] = []
        for i, (facts, counts) in enumerate(forwards):
            own = layers[name][i] if name in layers else _nothing(facts)
            try:
                whole = together(_parts(own, counts, group))
            except ValueError as error:
                raise DisagreementError(
                    f"{name}, forward {i}: {error}; ranks that hold a token have to route it alike"
                ) from None
            # Most layers have the same tokens: one tensor for all of them.
            token_N = token_N if torch.equal(token_N, whole.token_N) else whole.token_N
            found[name].append(Choices(**_facts(whole), token_N=token_N, expert_NK=whole.expert_NK))
    return found


def _facts(x: Choices) -> dict[str, Any]:
    return {"grid": x.grid, "num_experts": x.num_experts}


def _header(x: Choices) -> dict[str, Any]:
    return {"facts": {**_facts(x), "num_choices": x.expert_NK.shape[1]}, "text": x.facts, "count": len(x.token_N)}


def _nothing(facts: Mapping[str, Any]) -> Choices:
    """Of a layer that this rank does not have."""
    (rows, length), num_experts, num_choices = facts.values()
    token_N = torch.empty(0, dtype=torch.int64, device="cpu")
    expert_NK = torch.empty(0, num_choices, dtype=ID_DTYPE, device="cpu")
    return Choices(grid=(rows, length), num_experts=num_experts, token_N=token_N, expert_NK=expert_NK)


def _agreed(name: str, headers: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], list[int]]]:
    """For each forward of a layer its facts and the number of tokens of each rank. The same error on every rank
    where those that have the layer differ."""
    of_rank = {rank: header[name] for rank, header in enumerate(headers) if name in header}
    told = {
        rank: ", ".join(f"{count} x ({text})" for text, count in Counter(x["text"] for x in forwards).items())
        for rank, forwards in of_rank.items()
    }
    if len({json.dumps([x["facts"] for x in forwards]) for forwards in of_rank.values()}) > 1:
        raise DisagreementError(
            f"{name} was not recorded alike ({who_says_what(told)}); gather what ranks recorded in the same forwards"
        )
    first, *_ = of_rank.values()
    return [
        (x["facts"], [of_rank[rank][i]["count"] if rank in of_rank else 0 for rank in range(len(headers))])
        for i, x in enumerate(first)
    ]


def _parts(mine: Choices, counts: Sequence[int], group: dist.ProcessGroup) -> list[Choices]:
    """What each rank has of one forward. Tokens and ids travel as bytes: backends do not know every dtype."""
    sent_NW = torch.cat(
        [mine.token_N.view(-1, 1).view(torch.uint8), mine.expert_NK.contiguous().view(torch.uint8)], dim=1
    )
    ranks = group.size()
    received_NW = exchange_rows(
        sent_NW.to(device_of(group)).repeat(ranks, 1), (len(sent_NW),) * ranks, counts, group
    ).cpu()
    token_N = received_NW[:, :TOKEN_BYTES].contiguous().view(torch.int64).flatten()
    expert_NK = received_NW[:, TOKEN_BYTES:].contiguous().view(ID_DTYPE)
    return [
        Choices(**_facts(mine), token_N=token_n, expert_NK=expert_nK)
        for token_n, expert_nK in zip(token_N.split(list(counts)), expert_NK.split(list(counts)), strict=True)
    ]


def _texts(text: str, group: dist.ProcessGroup) -> list[str]:
    """The text of each rank."""
    ones, device = (1,) * group.size(), device_of(group)
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    sizes = exchange_rows(torch.full((len(ones),), len(data), device=device), ones, ones, group).tolist()
    received = exchange_rows(data.repeat(len(ones)), (len(data),) * len(ones), sizes, group)
    return [bytes(part.tolist()).decode() for part in received.cpu().split(sizes)]
