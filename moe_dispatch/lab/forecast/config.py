"""The TOML file of a plan, as frozen values: dimensions of a model, its load, and a cluster."""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ...plan.ids.format import MOST_EXPERTS

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Dtype = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ModelDims:
    """What dispatch needs to know of an MoE layer. ``groups`` and ``limited_groups``: node-limited routing."""

    dim: int = Field(ge=1)
    experts: int = Field(ge=1, le=MOST_EXPERTS)
    top_k: int = Field(ge=1)
    groups: int = Field(default=1, ge=1)
    limited_groups: int = Field(default=1, ge=1)
    dtype: Dtype
    weight_dtype: Dtype


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Load:
    """Tokens on each rank, and the exponent of Zipf's law among experts (0: all alike)."""

    tokens_per_rank: int = Field(ge=1, le=2**31)  # counts of bytes fit in an int64
    zipf: float = Field(ge=0)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Cluster:
    """Gigabytes (1e9) per second of one rank in each direction, and microseconds that a collective takes at least."""

    nodes: int = Field(ge=1)
    ranks_per_node: int = Field(ge=1)
    intra_gb_s: float = Field(gt=0)
    inter_gb_s: float = Field(gt=0)
    latency_us: float = Field(ge=0)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class PlanConfig:
    """All of a plan."""

    model: ModelDims
    load: Load
    cluster: Cluster


def load_plan_config(path: Path, changes: dict[str, dict[str, Any]]) -> PlanConfig:
    """The config of a TOML file, with some values taken from the command line.

    Args:
        changes: {table: {key: value}}, in place of those of the file.

    Raises:
        ValueError: a file that cannot be read, is no TOML, or breaks rules, which are then all listed.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} cannot be read ({error}); name a readable TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {path} is not valid TOML: {error}; correct that place (https://toml.io)") from None
    for name, values in changes.items():
        if isinstance(table.setdefault(name, {}), dict):
            table[name] |= values
    try:
        config = TypeAdapter(PlanConfig).validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        raise _error(path, [_problem(detail) for detail in error.errors()]) from None
    if problems := _broken_rules(config):
        raise _error(path, problems)
    return config


def _broken_rules(config: PlanConfig) -> list[str]:
    model, cluster, problems = config.model, config.cluster, []
    if model.experts % model.groups:
        problems.append(
            f"model.groups is {model.groups}, but there are {model.experts} experts; it has to divide them, "
            "e.g. groups = 1"
        )
    elif model.limited_groups > model.groups:
        problems.append(
            f"model.limited_groups is {model.limited_groups} of {model.groups} groups; it can be all of them at most"
        )
    elif model.top_k > model.experts // model.groups * model.limited_groups:
        problems.append(
            f"model.top_k is {model.top_k}, but a token reaches "
            f"{model.experts // model.groups * model.limited_groups} experts; choose at most as many"
        )
    if cluster.ranks > 4096:
        problems.append(f"cluster.nodes x ranks_per_node is {cluster.ranks} ranks; plan for at most 4096")
    return problems


def _error(path: Path, problems: list[str]) -> ValueError:
    return ValueError("\n  ".join([f"config {path} cannot be used:", *problems]))


def _problem(detail: Any) -> str:
    """One error of pydantic: key, fact, rule."""
    key = ".".join(str(step) for step in detail["loc"])
    if detail["type"] == "missing":
        return f"{key} is missing; give it a value, e.g. as in configs/plan/deepseek_v3.toml"
    if detail["type"] == "unexpected_keyword_argument":
        return f"{key} is not a known key; remove it, or see configs/plan/deepseek_v3.toml for the keys"
    rule = detail["msg"].removeprefix("Input should be ")
    return f"{key} is {detail['input']!r}; it has to be {rule}"
