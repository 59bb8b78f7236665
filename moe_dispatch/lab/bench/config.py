"""The TOML file of a bench run, as frozen values."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ...layout.partition import Partition

# strict: a number in quotes is a mistake, not a number
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DispatchConfig:
    """Tokens through identity experts: ``tokens`` on each rank, or a list with one number per rank. ``turns``: how
    often to time it in one repetition."""

    name: str = Field(min_length=1)
    ranks: int = Field(ge=1)
    tokens: int | tuple[int, ...]
    dim: int = Field(ge=1)
    experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    zipf: float = Field(default=0.0, ge=0)
    turns: int = Field(default=1, ge=1)

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
        if self.top_k > self.experts:
            return (
                f"top_k is {self.top_k}, of {self.experts} experts; a token chooses as many different ones or fewer"
            )
        return _problem_of_sizes("tokens", self.tokens_per_rank, self.ranks)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class UlyssesConfig:
    """Attention over ranks: ``seq`` tokens of each row cut as evenly as can be, or a list, one length per rank."""

    name: str = Field(min_length=1)
    ranks: int = Field(ge=1)
    batch: int = Field(ge=1)
    seq: int | tuple[int, ...]
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    turns: int = Field(default=1, ge=1)

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.seq if isinstance(self.seq, tuple) else Partition.balanced(self.seq, self.ranks).sizes

    @property
    def shape(self) -> str:
        seq = "+".join(map(str, self.seq)) if isinstance(self.seq, tuple) else str(self.seq)
        heads = f"N {self.heads}, G {self.kv_heads}, H {self.head_dim}"
        turns = f", {self.turns} turns a repetition" if self.turns > 1 else ""
        return f"{self.ranks} ranks, B {self.batch}, S {seq}, {heads}, {self.dtype}{turns}"

    def problem(self) -> str:
        if self.heads % self.kv_heads:
            return f"kv_heads is {self.kv_heads}; it has to divide heads, which is {self.heads}"
        sizes = self.seq if isinstance(self.seq, tuple) else (self.seq,) * self.ranks
        return _problem_of_sizes("seq", sizes, self.ranks)


WorkloadConfig = DispatchConfig | UlyssesConfig


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class BenchConfig:
    """``[[dispatch]]`` and ``[[ulysses]]`` tables, at least one."""

    dispatch: tuple[DispatchConfig, ...] = ()
    ulysses: tuple[UlyssesConfig, ...] = ()

    @property
    def workloads(self) -> tuple[WorkloadConfig, ...]:
        return (*self.dispatch, *self.ulysses)


def load_bench(path: Path) -> BenchConfig:
    """The config of a TOML file.

    Raises:
        ValueError: a file that cannot be read, is no TOML, or breaks rules, which are then all listed.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(
            f"config {path} cannot be read ({error}); name a TOML file, e.g. configs/bench_tiny.toml"
        ) from None
    try:
        config = TypeAdapter(BenchConfig).validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        problems = [_told(detail, table) for detail in error.errors()]
    else:
        problems = [
            f'"{workload.name}": {problem}' for workload in config.workloads if (problem := workload.problem())
        ]
        names = [workload.name for workload in config.workloads]
        problems += [
            f'two workloads are named "{name}"; name each once'
            for name in sorted({n for n in names if names.count(n) > 1})
        ]
        if not names:
            problems.append(
                "it has no workload; add a [[dispatch]] or [[ulysses]] table, as configs/bench.toml has them"
            )
        if not problems:
            return config
    raise ValueError("\n  ".join([f"config {path} cannot be used:", *dict.fromkeys(problems)]))


def _problem_of_sizes(key: str, sizes: tuple[int, ...], ranks: int) -> str:
    if len(sizes) != ranks:
        return f"{key} has {len(sizes)} numbers for {ranks} ranks; give one for each, or a single number"
    if min(sizes) < 0 or not sum(sizes):
        return f"{key} is {sizes}; numbers have to be at least 0, and one of them above"
    return ""


def _told(detail: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """One error of pydantic with its key and the workload's name."""
    place = [step for step in detail["loc"] if step not in ("int", "tuple[int, ...]")]
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
    if len(place) > 1 and isinstance(place[1], int):
        row = table[place[0]][place[1]]
        key += f' ("{row["name"]}")' if isinstance(row, dict) and "name" in row else ""
    if detail["type"] == "missing":
        return f"{key} is missing; see configs/bench.toml for an example"
    if detail["type"] == "unexpected_keyword_argument":
        return f"{key} is not a known key; see configs/bench.toml for those that are"
    return f"{key} is {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"
