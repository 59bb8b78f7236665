"""The config of a plan: dimensions of a model, its load, and a cluster."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ...plan.ids.format import MOST_EXPERTS
from ..desk.config_file import STRICT, checked, read_toml, refusal

MOST_RANKS, MOST_SEQUENCE_RANKS = 4096, 64  # every rank of a sequence is planned by itself
Dtype = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ModelDims:
    """What dispatch needs to know of an MoE layer. ``groups`` and ``limited_groups``: node-limited routing."""

    dim: int = Field(ge=1, le=2**20, examples=[7168])
    experts: int = Field(ge=1, le=MOST_EXPERTS, examples=[256])
    top_k: int = Field(ge=1, le=MOST_EXPERTS, examples=[8])
    groups: int = Field(default=1, ge=1, le=MOST_EXPERTS, examples=[8])
    limited_groups: int = Field(default=1, ge=1, le=MOST_EXPERTS, examples=[4])
    dtype: Dtype = Field(examples=["bfloat16"])
    weight_dtype: Dtype = Field(examples=["float32"])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Load:
    """Tokens on each rank, and the exponent of Zipf's law among experts (0: all alike)."""

    tokens_per_rank: int = Field(ge=1, le=2**31, examples=[4096])  # counts of bytes fit in an int64
    zipf: float = Field(ge=0, le=100.0, examples=[0.5])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Cluster:
    """Gigabytes (1e9) per second of one rank in each direction, and microseconds that a collective takes at least."""

    nodes: int = Field(ge=1, le=MOST_RANKS, examples=[8])
    ranks_per_node: int = Field(ge=1, le=MOST_RANKS, examples=[8])
    intra_gb_s: float = Field(gt=0, le=1e9, examples=[160.0])
    inter_gb_s: float = Field(gt=0, le=1e9, examples=[50.0])
    latency_us: float = Field(ge=0, le=1e9, examples=[30.0])

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class AttentionDims:
    """Causal attention of one sequence over ranks. ``window``: keys before its own that a query sees, 0 for all.
    ``documents``: their lengths; none for one document. ``tflop_s``: 1e12 operations per second of a rank."""

    heads: int = Field(ge=1, le=2**16, examples=[64])
    kv_heads: int = Field(ge=1, le=2**16, examples=[8])
    width: int = Field(ge=1, le=2**16, examples=[128])
    value_width: int = Field(ge=1, le=2**16, examples=[128])
    length: int = Field(ge=1, le=2**31, examples=[131072])
    ranks: int = Field(ge=1, le=MOST_SEQUENCE_RANKS, examples=[16])
    window: int = Field(default=0, ge=0, le=2**31, examples=[128])
    documents: tuple[int, ...] = Field(default=(), examples=[[4096, 1024]])
    tflop_s: float = Field(gt=0, le=1e9, examples=[400.0])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class PlanConfig:
    """All of a plan. Without a table ``attention``, of the MoE layer only."""

    model: ModelDims = Field(description="a table", examples=["[model]"])
    load: Load = Field(description="a table", examples=["[load]"])
    cluster: Cluster = Field(description="a table", examples=["[cluster]"])
    attention: AttentionDims | None = Field(default=None, description="a table", examples=["[attention]"])


def load_plan_config(path: Path, changes: Mapping[str, Mapping[str, Any]]) -> PlanConfig:
    """The config of a TOML file, with some values taken from the command line.

    Args:
        changes: {table: {key: value}}, in place of those of the file.

    Raises:
        ConfigError: a file that cannot be read, is no TOML, or breaks rules, which are then all listed.
    """
    table = read_toml(path)
    for name, values in changes.items():
        if not values:
            continue
        if isinstance(table.setdefault(name, {}), dict):
            table[name] |= values
    config = checked(PlanConfig, table, path)
    if problems := _broken_rules(config):
        raise refusal(path, problems)
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
    if cluster.ranks > MOST_RANKS:
        problems.append(f"cluster.nodes x ranks_per_node is {cluster.ranks} ranks; plan for at most {MOST_RANKS}")
    if config.attention is not None:
        problems += _broken_rules_of(config.attention)
    return problems


def _broken_rules_of(attention: AttentionDims) -> list[str]:
    problems = []
    if attention.heads % attention.kv_heads:
        problems.append(
            f"attention.kv_heads is {attention.kv_heads}, but there are {attention.heads} query heads; it has to "
            "divide them"
        )
    if attention.documents and (min(attention.documents) < 1 or sum(attention.documents) > attention.length):
        problems.append(
            f"attention.documents are {sum(attention.documents)} tokens, the shortest of "
            f"{min(attention.documents)}; each has at least 1, and all at most attention.length, {attention.length}"
        )
    return problems
