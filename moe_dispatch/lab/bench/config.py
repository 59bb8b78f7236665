"""The config of a bench run: its workloads."""

from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ... import Partition
from ...plan.ids.format import MOST_EXPERTS
from ..desk.config_file import STRICT, checked, read_toml, refusal

MOST_RANKS = 64  # processes of this machine, 0.3 GB each
MOST_PLANNED_RANKS = 4096  # of which one is there
MOST_WIDTH = 2**20
MOST_TOKENS = 2**31
Dtype = Literal["bfloat16", "float16", "float32", "float64"]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DispatchConfig:
    """Tokens through identity experts: ``tokens`` on each rank, or a list with one number per rank. ``turns``: how
    often to time it in one repetition."""

    name: str = Field(min_length=1, examples=['"a"'])
    ranks: int = Field(ge=1, le=MOST_RANKS, examples=[4])
    tokens: int | tuple[int, ...] = Field(description="an int, or a list with one int per rank", examples=[2048])
    dim: int = Field(ge=1, le=MOST_WIDTH, examples=[1024])
    experts: int = Field(ge=1, le=MOST_EXPERTS, examples=[32])
    top_k: int = Field(ge=1, le=MOST_EXPERTS, examples=[8])
    dtype: Dtype = Field(examples=["bfloat16"])
    zipf: float = Field(default=0.0, ge=0, le=100.0, examples=[1.0])
    turns: int = Field(default=1, ge=1, le=10000, examples=[1])

    @property
    def kind(self) -> str:
        return "dispatch"

    @property
    def tokens_per_rank(self) -> tuple[int, ...]:
        return self.tokens if isinstance(self.tokens, tuple) else (self.tokens,) * self.ranks

    @property
    def shape(self) -> str:
        tokens = "+".join(map(str, self.tokens)) if isinstance(self.tokens, tuple) else f"{self.tokens} each"
        sizes = f"{self.ranks} ranks, tokens {tokens}, D {self.dim}, E {self.experts}, K {self.top_k}, {self.dtype}"
        sizes += f", Zipf {self.zipf:g}" if self.zipf else ""
        return sizes + (f", {self.turns} turns a repetition" if self.turns > 1 else "")

    def problem(self) -> str:
        problem = _problem_of_choices(self.top_k, self.experts)
        return problem or _problem_of_sizes("tokens", self.tokens_per_rank, self.ranks)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class HeadsConfig:
    """Heads over ranks: ``seq`` tokens of each row cut as evenly as can be, or a list, one length per rank."""

    name: str = Field(min_length=1, examples=['"a"'])
    ranks: int = Field(ge=1, le=MOST_RANKS, examples=[4])
    batch: int = Field(ge=1, le=MOST_WIDTH, examples=[2])
    seq: int | tuple[int, ...] = Field(description="an int, or a list with one int per rank", examples=[4096])
    heads: int = Field(ge=1, le=MOST_WIDTH, examples=[16])
    kv_heads: int = Field(ge=1, le=MOST_WIDTH, examples=[4])
    head_dim: int = Field(ge=1, le=MOST_WIDTH, examples=[64])
    dtype: Dtype = Field(examples=["bfloat16"])
    turns: int = Field(default=1, ge=1, le=10000, examples=[1])

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.seq if isinstance(self.seq, tuple) else Partition.balanced(self.seq, self.ranks).sizes

    @property
    def shape(self) -> str:
        seq = "+".join(map(str, self.seq)) if isinstance(self.seq, tuple) else str(self.seq)
        heads = f"N {self.heads}, G {self.kv_heads}, H {self.head_dim}"
        turns = f", {self.turns} turns a repetition" if self.turns > 1 else ""
        return f"{self.ranks} ranks, B {self.batch}, S {seq}, {heads}, {self.dtype}{self.mask}{turns}"

    @property
    def mask(self) -> str:
        """What ``shape`` tells of the mask; nothing where there is none."""
        return ""

    def problem(self) -> str:
        if self.heads % self.kv_heads:
            return f"kv_heads is {self.kv_heads}; it has to divide heads, which is {self.heads}"
        sizes = self.seq if isinstance(self.seq, tuple) else (self.seq,) * self.ranks
        return _problem_of_sizes("seq", sizes, self.ranks)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class UlyssesConfig(HeadsConfig):
    """The exchange of Ulysses around an attention that is a sum."""

    @property
    def kind(self) -> str:
        return "ulysses"


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class AttentionConfig(HeadsConfig):
    """Causal attention over ranks, computed. ``window``: how many keys before its own a query sees, -1 for all."""

    window: int = Field(default=-1, ge=-1, le=MOST_TOKENS, examples=[256])

    @property
    def kind(self) -> str:
        return "attention"

    @property
    def mask(self) -> str:
        return f", causal, window {self.window}" if self.window >= 0 else ", causal"


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class PlanOfManyConfig:
    """A plan on one rank of many, in one process: ``tokens`` on each rank, experts dealt as evenly as can be."""

    name: str = Field(min_length=1, examples=['"a"'])
    ranks: int = Field(ge=2, le=MOST_PLANNED_RANKS, examples=[1024])
    tokens: int = Field(ge=1, le=MOST_WIDTH, examples=[4096])
    experts: int = Field(ge=1, le=MOST_EXPERTS, examples=[256])
    top_k: int = Field(ge=1, le=MOST_EXPERTS, examples=[8])

    @property
    def kind(self) -> str:
        return "plan"

    @property
    def shape(self) -> str:
        return f"one rank of {self.ranks}, tokens {self.tokens} each, E {self.experts}, K {self.top_k}"

    def problem(self) -> str:
        return _problem_of_choices(self.top_k, self.experts)


ExchangeConfig = DispatchConfig | UlyssesConfig | AttentionConfig  # on ranks that are all there
WorkloadConfig = ExchangeConfig | PlanOfManyConfig


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class BenchConfig:
    """``[[dispatch]]``, ``[[ulysses]]``, ``[[attention]]`` and ``[[plan]]`` tables, at least one."""

    dispatch: tuple[DispatchConfig, ...] = Field(
        default=(), description="a list of tables", examples=["[[dispatch]]"]
    )
    ulysses: tuple[UlyssesConfig, ...] = Field(default=(), description="a list of tables", examples=["[[ulysses]]"])
    attention: tuple[AttentionConfig, ...] = Field(
        default=(), description="a list of tables", examples=["[[attention]]"]
    )
    plan: tuple[PlanOfManyConfig, ...] = Field(default=(), description="a list of tables", examples=["[[plan]]"])

    @property
    def workloads(self) -> tuple[WorkloadConfig, ...]:
        return (*self.dispatch, *self.ulysses, *self.attention, *self.plan)


def load_bench(path: Path) -> BenchConfig:
    """The config of a TOML file.

    Raises:
        ConfigError: a file that cannot be read, is no TOML, or breaks rules, which are then all listed.
    """
    config = checked(BenchConfig, read_toml(path), path, entry="workload")
    if problems := _broken_rules(config):
        raise refusal(path, problems)
    return config


def _broken_rules(config: BenchConfig) -> list[str]:
    problems = [f'"{workload.name}": {problem}' for workload in config.workloads if (problem := workload.problem())]
    for name, count in Counter(workload.name for workload in config.workloads).items():
        if count > 1:
            problems.append(f'two workloads are named "{name}"; name each once')
    if not config.workloads:
        problems.append(
            "it has no workload; add a [[dispatch]], [[ulysses]], [[attention]] or [[plan]] table, as the files of "
            "configs/bench/ have them"
        )
    return problems


def _problem_of_choices(top_k: int, experts: int) -> str:
    if top_k <= experts:
        return ""
    return f"top_k is {top_k}, of {experts} experts; a token chooses as many different ones or fewer"


def _problem_of_sizes(key: str, sizes: tuple[int, ...], ranks: int) -> str:
    if len(sizes) != ranks:
        return f"{key} has {len(sizes)} numbers for {ranks} ranks; give one for each, or a single number"
    if min(sizes) < 0 or not sum(sizes):
        return f"{key} is {sizes}; numbers have to be at least 0, and one of them above"
    if max(sizes) > MOST_TOKENS:
        return f"{key} is {max(sizes)}; it has to be at most {MOST_TOKENS}"
    return ""
