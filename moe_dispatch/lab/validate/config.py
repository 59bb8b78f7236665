"""The TOML file of a validate run, as frozen values: read once, checked whole, every problem told at once."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from .config_rules import broken_rules

# strict: a number in quotes is a mistake, not a number
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ConfigError(ValueError):
    """A config that cannot be used; the text names the file, then each problem with its key, one per line."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ModelConfig:
    """Dimensions of the DeepSeek-style model; ``q_lora_rank`` 0: queries straight from the hidden state."""

    dim: int = Field(ge=1, examples=[64])
    vocab: int = Field(ge=256, examples=[256])  # a token is a byte
    layers: int = Field(ge=1, examples=[3])
    dense_layers: int = Field(ge=0, examples=[1])
    dense_hidden: int = Field(ge=1, examples=[128])
    heads: int = Field(ge=1, examples=[4])
    q_lora_rank: int = Field(ge=0, examples=[24])
    kv_lora_rank: int = Field(ge=1, examples=[16])
    nope_head_dim: int = Field(ge=1, examples=[16])
    rope_head_dim: int = Field(ge=2, examples=[8])
    value_head_dim: int = Field(ge=1, examples=[12])
    experts: int = Field(ge=1, examples=[8])
    top_k: int = Field(ge=1, examples=[3])
    shared_experts: int = Field(ge=0, examples=[1])
    expert_hidden: int = Field(ge=1, examples=[32])
    groups: int = Field(ge=1, examples=[1])
    limited_groups: int = Field(ge=1, examples=[1])
    score: Literal["sigmoid", "softmax"] = Field(examples=["sigmoid"])
    normalize: bool = Field(examples=["true"])
    route_scale: float = Field(gt=0, examples=[2.5])
    balance_coefficient: float = Field(ge=0, examples=[0.001])
    bias_rate: float = Field(ge=0, examples=[0.001])
    rope_theta: float = Field(gt=0, examples=[10000.0])
    norm_eps: float = Field(gt=0, examples=[1e-6])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TrainConfig:
    """A global batch of ``batch`` rows of ``seq`` tokens, ``steps`` steps of AdamW."""

    batch: int = Field(ge=1, examples=[3])
    seq: int = Field(ge=1, examples=[129])
    steps: int = Field(ge=1, examples=[4])
    learning_rate: float = Field(gt=0, examples=[0.003])
    weight_decay: float = Field(ge=0, examples=[0.1])
    seed: int = Field(ge=0, examples=[0])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ToleranceConfig:
    """Largest max |difference| / max |value| that counts as agreement, per quantity."""

    logits: float = Field(gt=0, examples=[1e-4])
    loss: float = Field(gt=0, examples=[1e-4])
    gradients: float = Field(gt=0, examples=[1e-4])
    loss_curve: float = Field(gt=0, examples=[1e-4])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class RowConfig:
    """One row of the matrix: dp x sp x tp ranks, groups of ``ep`` of them share the experts; B, L global.

    ``documents``, each [real tokens, places], are packed end to end into one row; without them each row is one. A
    query sees ``window`` keys back, all of them for -1.
    """

    name: str = Field(min_length=1, examples=['"FSDP2 + TP2"'])
    dp: int = Field(default=1, ge=1, examples=[2])
    sp: int = Field(default=1, ge=1, examples=[1])
    tp: int = Field(default=1, ge=1, examples=[2])
    ep: int = Field(default=1, ge=1, examples=[2])
    batch: int = Field(ge=1, examples=[3])
    seq: int = Field(ge=1, examples=[129])
    heads: int = Field(ge=1, examples=[4])
    documents: tuple[tuple[int, int], ...] = Field(
        default=(), description="a list of [tokens, places]", examples=["[[40, 48], [50, 50]]"]
    )
    window: int = Field(default=-1, ge=-1, examples=[-1])

    @property
    def data(self) -> tuple[int, int, int, tuple[tuple[int, int], ...], int]:
        """What one process needs to know of the row: rows with the same have the same reference."""
        return self.batch, self.seq, self.heads, self.documents, self.window

    @property
    def mesh(self) -> str:
        return f"dp {self.dp}, sp {self.sp}, tp {self.tp}, ep {self.ep}"


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ValidateConfig:
    """All of a validate run. Every row of the matrix uses all ``ranks``."""

    ranks: int = Field(ge=1, examples=[4])
    dtypes: tuple[Literal["float32", "float64"], ...] = Field(
        min_length=1, description="a list", examples=['["float32", "float64"]']
    )
    model: ModelConfig = Field(description="a table", examples=["[model]"])
    train: TrainConfig = Field(description="a table", examples=["[train]"])
    tolerance: dict[str, ToleranceConfig] = Field(description="a table per dtype", examples=["[tolerance.float64]"])
    rows: tuple[RowConfig, ...] = Field(min_length=1, description="a list of tables", examples=["[[rows]]"])


TABLES: Mapping[str, type] = {
    "model": ModelConfig,
    "train": TrainConfig,
    "tolerance": ToleranceConfig,
    "rows": RowConfig,
}


# A row without one of these keys takes the value of this table.
DEFAULT_OF_ROW: Mapping[str, str] = {"batch": "train", "seq": "train", "heads": "model"}


def load_config(path: Path) -> ValidateConfig:
    """The config of a TOML file; a row without ``batch`` or ``seq`` takes those of ``[train]``.

    Raises:
        ConfigError: a file that cannot be read, is no TOML, or breaks rules, which are then all listed.
    """
    table = _read_toml(path)
    _fill_rows(table)
    try:
        config = TypeAdapter(ValidateConfig).validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        # A list that lost its only entry to an error is also reported as too short.
        details = [detail for detail in error.errors() if detail["type"] != "too_short" or not detail["input"]]
        raise _error(path, [_problem(detail, table) for detail in details]) from None
    if problems := broken_rules(config):
        raise _error(path, problems)
    return config


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist; name a TOML file, e.g. configs/tiny.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read ({error}); name a readable TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {path} is not valid TOML: {error}; correct that place (https://toml.io)") from None


def _fill_rows(table: dict[str, Any]) -> None:
    rows = table.get("rows")
    for row in rows if isinstance(rows, list) else []:
        for key, source in DEFAULT_OF_ROW.items():
            if isinstance(row, dict):
                # 1 where that table lacks it too: the missing key is then the one problem to tell
                values = table.get(source)
                row.setdefault(key, values.get(key, 1) if isinstance(values, dict) else 1)


def _error(path: Path, problems: Sequence[str]) -> ConfigError:
    unique = dict.fromkeys(problems)  # a bad train.batch is also every row's
    return ConfigError("\n  ".join([f"config {path} cannot be used:", *unique]))


def _problem(detail: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """One error of pydantic in our words: key, fact, rule, a value that works."""
    place, last = detail["loc"], str(detail["loc"][-1])
    fields = _fields(place)
    source = DEFAULT_OF_ROW.get(last, "")
    if place[0] == "rows" and source and detail["input"] == table[source].get(last):
        place = (source, last)
    key = _key(place, table)
    if detail["type"] == "unexpected_keyword_argument":
        near = difflib.get_close_matches(last, fields, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(fields)}"
        return f"{key} is not a known key; {remedy}"
    fact = "is missing" if detail["type"] == "missing" else f"is {detail['input']!r}"
    if last not in fields:  # an entry of a list, or a table under a key of the user's choice
        return f"{key} {fact}; it has to be {'a table' if place[0] in TABLES else 'one of float32, float64'}"
    field = fields[last]
    example = str((field.examples or [""])[0])
    example = example if example.startswith("[") and last in TABLES else f"{last} = {_toml(example, field)}"
    return f"{key} {fact}; it has to be {_rule(field)}, e.g. {example}"


def _fields(place: Sequence[str | int]) -> dict[str, FieldInfo]:
    """The keys of the table in which the last step of ``place`` is looked up."""
    table = TABLES[str(place[0])] if len(place) > 1 and place[0] in TABLES else ValidateConfig
    return table.__pydantic_fields__  # pyright: ignore[reportAttributeAccessIssue]


def _key(place: Sequence[str | int], table: Mapping[str, Any]) -> str:
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
    if place[0] == "rows" and len(place) > 1:
        row = table["rows"][place[1]]
        if isinstance(row, dict) and isinstance(row.get("name"), str):
            key += f' (row "{row["name"]}")'
    return key


def _rule(field: FieldInfo) -> str:
    if field.description:
        return field.description
    if get_origin(field.annotation) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(field.annotation))
    words: Mapping[object, str] = {
        int: "an int",
        float: "a number",
        bool: "true or false",
        str: "a non-empty string",
    }
    bounds = [f" of at least {bound.ge:g}" for bound in field.metadata if hasattr(bound, "ge")]
    bounds += [f" above {bound.gt:g}" for bound in field.metadata if hasattr(bound, "gt")]
    return words[field.annotation] + "".join(bounds)


def _toml(example: str, field: FieldInfo) -> str:
    return f'"{example}"' if get_origin(field.annotation) is Literal else example
