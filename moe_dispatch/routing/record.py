"""What was routed where, whatever the layout."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .choices import Choices
from .files import read_choices, write_choices
from .gathering import gather_choices
from .sites import sites_of


class RoutingRecord:
    """The experts of every token in every layer, by global token: the number of a token in the whole (B, L) batch,
    ``row * L + position``. So it is the same for every layout. Made by :func:`record_routing`, :meth:`load` or
    :meth:`of_experts`.

    Attributes:
        layers: for each name, what the layer chose in each of its forwards, in their order: ``Choices`` with
            ``grid`` (B, L), ``num_experts``, ``token_N`` and ``expert_NK``, on the CPU.
    """

    __slots__ = ("_layers",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, layers: Mapping[str, Iterable[Choices]]) -> None:
        self._layers = {name: tuple(forwards) for name, forwards in layers.items()}

    @property
    def layers(self) -> Mapping[str, tuple[Choices, ...]]:
        return MappingProxyType(self._layers)

    @classmethod
    def of_experts(cls, expert_BLK: Mapping[str, Sequence[Tensor]], *, num_experts: int) -> "RoutingRecord":
        """A record from tensors, e.g. those of an inference engine.

        Args:
            expert_BLK: for each name of a layer, its forwards: (B, L, K) ints, row after row whatever the order of
                the tensors in training; -1 for no expert.
            num_experts: E, of all ranks.

        Raises:
            ValueError: tensors of another shape, or ids that are no experts.
        """
        return cls(
            {name: [Choices.of_all(x, num_experts) for x in forwards] for name, forwards in expert_BLK.items()}
        )

    def gather(self, group: dist.ProcessGroup) -> "RoutingRecord":
        """The record of all ranks of ``group``, on each of them; every rank calls it. Ranks may have recorded other
        tokens, and, in a pipeline, other layers. One exchange for each forward of each layer, and two small ones.

        Raises:
            DisagreementError: on every rank: one layer with other forwards on another rank, or other experts for
                the same token.
        """
        return RoutingRecord(gather_choices(self.layers, group))

    def restrict_to(self, model: nn.Module) -> "RoutingRecord":
        """Only the layers that ``model`` has: for a stage of a pipeline. ValueError if it has others too."""
        names = sites_of(model)
        if missing := [name for name in names if name not in self._layers]:
            raise ValueError(f"{self} has no layers {missing}; it has {list(self._layers)}")
        return RoutingRecord({name: self._layers[name] for name in names})

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to ``path`` as safetensors: for each forward of each layer ``{name}.{forward}.experts``,
        (B, L, K) int16, and for tokens of some ranks only (N, K) with ``{name}.{forward}.tokens``, (N,) int64.

        Raises:
            ImportError: without safetensors; ``pip install moe-dispatch[records]`` brings it.
        """
        write_choices(self.layers, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "RoutingRecord":
        """Read what :meth:`save` wrote.

        Raises:
            ImportError: without safetensors; ``pip install moe-dispatch[records]`` brings it.
            ValueError: another kind of file.
        """
        return cls(read_choices(path))

    def __eq__(self, other: object) -> bool:
        """The same layers, forwards, tokens and experts."""
        if not isinstance(other, RoutingRecord):
            return NotImplemented
        return self._layers.keys() == other._layers.keys() and all(
            len(mine) == len(others) and all(map(_are_equal, mine, others))
            for mine, others in ((forwards, other._layers[name]) for name, forwards in self._layers.items())
        )

    def __repr__(self) -> str:
        layers, counts = len(self._layers), sorted({len(forwards) for forwards in self._layers.values()})
        of_forwards = f" of {' or '.join(map(str, counts))} forward{'s' * (counts != [1])}" * bool(counts)
        return f"RoutingRecord({layers} layer{'s' * (layers != 1)}{of_forwards})"


def _are_equal(one: Choices, other: Choices) -> bool:
    return (
        one.facts == other.facts
        and torch.equal(one.token_N, other.token_N)
        and torch.equal(one.expert_NK, other.expert_NK)
    )
