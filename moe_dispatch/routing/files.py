"""Records as safetensors files."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from .choices import Choices

# In the metadata of a file: what it is, and for each layer the facts of its forwards.
FORMAT, LAYERS = "moe_dispatch.routing", "layers"
VERSION = "1"


def write_choices(layers: Mapping[str, Sequence[Choices]], path: str | PathLike[str]) -> None:
    """See :meth:`RoutingRecord.save`."""
    save_file = _safetensors().torch.save_file
    tensors: dict[str, torch.Tensor] = {}
    for name, forwards in layers.items():
        for i, x in enumerate(forwards):
            tensors[f"{name}.{i}.experts"] = x.expert_NK.unflatten(0, x.grid) if x.is_whole else x.expert_NK
            if not x.is_whole:
                tensors[f"{name}.{i}.tokens"] = x.token_N.clone()  # layers share it, which no file does
    facts = {name: [[*x.grid, x.num_experts] for x in forwards] for name, forwards in layers.items()}
    contiguous = {name: x.contiguous() for name, x in tensors.items()}
    save_file(contiguous, str(path), metadata={FORMAT: VERSION, LAYERS: json.dumps(facts)})


def read_choices(path: str | PathLike[str]) -> dict[str, list[Choices]]:
    """See :meth:`RoutingRecord.load`."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get(FORMAT) != VERSION:
                raise ValueError(f"its metadata have {FORMAT} = {metadata.get(FORMAT)}, not {VERSION}")
            facts, arange_of_grid = json.loads(metadata[LAYERS]), dict[tuple[int, int], torch.Tensor]()
            return {
                name: [_read(file, f"{name}.{i}", x, arange_of_grid) for i, x in enumerate(forwards)]
                for name, forwards in facts.items()
            }
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no record of routing: {error}; RoutingRecord.save writes them") from error


def _read(file: Any, key: str, facts: Sequence[int], arange_of_grid: dict[tuple[int, int], torch.Tensor]) -> Choices:
    rows, length, num_experts = facts
    expert_NK = file.get_tensor(f"{key}.experts")
    if expert_NK.ndim == 2:
        token_N = file.get_tensor(f"{key}.tokens")
    else:
        expert_NK = expert_NK.flatten(0, 1)
        token_N = arange_of_grid.setdefault((rows, length), torch.arange(rows * length, device="cpu"))
    return Choices(grid=(rows, length), num_experts=num_experts, token_N=token_N, expert_NK=expert_NK)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "files of routing are safetensors, which is not installed here; pip install moe-dispatch[records]"
        ) from error
    return safetensors
