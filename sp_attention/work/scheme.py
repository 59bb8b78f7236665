"""How attention is spread over ranks."""

from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from typing import Any

ALL_RANKS = 0  # of the group: how many that is, the scheme need not know
NO_BOUND = 2**40  # places; more than any sequence has


class Keys(Enum):
    """How keys and values come to the queries."""

    GATHER = "gather"  # all at once
    RING = "ring"  # in turns, those of one rank (one team of them) at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the pairs of queries and keys are spread over the ranks of a group. Each gives what one rank gives.

    Use a constructor: :meth:`ulysses`, :meth:`gather`, :meth:`ring` or :meth:`two_dimensional`.

    The ranks are teams of ``head_ranks`` neighbours: ranks 0 and 1, 2 and 3, and so on for 2. The ranks of a team
    compute the queries that they hold together, each for its share of the heads. Keys and values come from all ranks
    that hold some which these queries see, and only those: what a causal mask, a window or documents close is not
    sent.

    Attributes:
        head_ranks: ranks of a team; 0 is all of the group.
        keys: whether keys and values come at once or in turns.
        keep: whether backward uses the gathered tensors of forward. If not, they are gathered again: as much memory
            less, and one exchange of them more.
        offload: whether what waits does so in the memory of the host: keys and values that further queries meet, and
            what backward needs, but for the tensors of the call itself.
        chunk: the most queries, and the most keys, that a rank has in flight beside its own. It need not divide
            anything. More is fewer and larger messages.
    """

    head_ranks: int
    keys: Keys
    keep: bool
    offload: bool
    chunk: int

    def __post_init__(self) -> None:
        _check_int("head_ranks", self.head_ranks, 0, "how many neighbouring ranks share the heads, 0 for all")
        _check_int("chunk", self.chunk, 1, "how many queries, and how many keys, are in flight at once")
        for name in ("keep", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it has to be True or False")
        if not isinstance(self.keys, Keys):
            raise ValueError(f"keys is {self.keys!r}; use {', '.join(str(each) for each in Keys)}")

    @classmethod
    def ulysses(cls, *, keep: bool = True, offload: bool = False, chunk: int = NO_BOUND) -> "Scheme":
        """Each rank computes all queries for its share of the heads. Bytes hardly depend on what is masked; ranks
        beyond the number of heads have nothing to do. Source: DeepSpeed-Ulysses (arXiv:2309.14509); with a chunk and
        offload, FPDT (arXiv:2408.16978)."""
        return cls(head_ranks=ALL_RANKS, keys=Keys.GATHER, keep=keep, offload=offload, chunk=chunk)

    @classmethod
    def gather(cls, *, keep: bool = False, offload: bool = False, chunk: int = NO_BOUND) -> "Scheme":
        """Queries stay. All keys and values that they see come in one exchange, while the rank's own are computed.
        Source: Llama 3 (arXiv:2407.21783), section 3.3.2, which gathers them all."""
        return cls(head_ranks=1, keys=Keys.GATHER, keep=keep, offload=offload, chunk=chunk)

    @classmethod
    def ring(cls, *, keep: bool = False, offload: bool = False, chunk: int = NO_BOUND) -> "Scheme":
        """Queries stay. Keys and values come in turns, those of one rank at a time; the next come while these are
        computed. Turns in which nobody needs anything are left out. Source: Ring Attention (arXiv:2310.01889), with
        rows sent from where they are to where they are needed, and not from neighbour to neighbour."""
        return cls(head_ranks=1, keys=Keys.RING, keep=keep, offload=offload, chunk=chunk)

    @classmethod
    def two_dimensional(
        cls,
        *,
        head_ranks: int,
        keys: str = "gather",
        keep: bool = False,
        offload: bool = False,
        chunk: int = NO_BOUND,
    ) -> "Scheme":
        """Ulysses within teams of ``head_ranks`` neighbours, gathered or ring keys between them. ``keys``:
        ``"gather"`` or ``"ring"``. Source: USP (arXiv:2405.07719)."""
        _check_int("head_ranks", head_ranks, 1, "how many neighbouring ranks share the heads")
        if keys not in [each.value for each in Keys]:
            raise ValueError(f'keys is {keys!r}; use "gather" (all at once) or "ring" (in turns)')
        return cls(head_ranks=head_ranks, keys=Keys(keys), keep=keep, offload=offload, chunk=chunk)

    def team_size(self, ranks: int) -> int:
        """How many ranks a team has in a group of ``ranks``. ValueError if teams do not fill it."""
        size = ranks if self.head_ranks == ALL_RANKS else self.head_ranks
        if ranks % size:
            raise ValueError(
                f"teams of {size} head ranks in a group of {ranks}; head_ranks has to divide the number of ranks"
            )
        return size

    @property
    def is_bounded(self) -> bool:
        """Whether a chunk bounds what is in flight."""
        return self.chunk != NO_BOUND

    def is_ulysses(self, ranks: int) -> bool:
        """Whether, in a group of ``ranks``, whole sequences come to shares of the heads in one exchange, and stay."""
        return self.keep and not self.offload and not self.is_bounded and self.team_size(ranks) == ranks

    def __str__(self) -> str:
        """For facts and tables."""
        heads = "all ranks" if self.head_ranks == ALL_RANKS else f"{self.head_ranks}"
        bound = f", chunk {self.chunk}" if self.is_bounded else ""
        kept = f"{', kept' if self.keep else ''}{', offload' if self.offload else ''}"
        return f"scheme with {heads} to the heads, keys {self.keys.value}{kept}{bound}"


def problem_of_scheme(scheme: Any, ranks: int) -> str:
    """What is wrong with what should be a scheme for a group of so many ranks; empty where nothing is."""
    if not isinstance(scheme, Scheme):
        return f"scheme is {scheme!r}; pass a Scheme, e.g. Scheme.gather()"
    try:
        scheme.team_size(ranks)
    except ValueError as error:
        return f"{error}"
    return ""


def team(rank: int, team_size: int) -> int:
    """Which team a rank is in: neighbours are a team."""
    return rank // team_size


def head_rank(rank: int, team_size: int) -> int:
    """Which rank of its team it is."""
    return rank % team_size


def _check_int(name: str, value: Any, least: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; it is {what}, an int of at least {least}")


ULYSSES = Scheme.ulysses()
