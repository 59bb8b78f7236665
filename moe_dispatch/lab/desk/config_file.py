"""A TOML file as frozen values: read, checked by pydantic, and refused with all its problems at once.

What the keys mean is in the ``config.py`` of each tool.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .config_errors import problem_text

T = TypeVar("T")

# strict: a number in quotes is a mistake, not a number
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ConfigError(ValueError):
    """A config that cannot be used; the text names the file, then each problem with its key, one per line."""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist; name a TOML file, or a packaged config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read ({error}); name a readable TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {path} is not valid TOML: {error}; correct that place (https://toml.io)") from None


def checked(kind: type[T], table: dict[str, Any], path: Path, *, entry: str = "") -> T:
    """``table`` as a ``kind``, a pydantic dataclass whose fields have ``examples``.

    Args:
        path: the file that ``table`` is from.
        entry: what the tool calls an entry of a list of tables, e.g. "row". Its problems are listed with its name.

    Raises:
        ConfigError: a key is missing, unknown, or has a wrong value. All such problems are listed.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        # A list that lost its only entry to an error is also reported as too short.
        details = [detail for detail in error.errors() if detail["type"] != "too_short" or not detail["input"]]
        problems = [
            problem_text(detail["type"], detail["loc"], detail["input"], kind, table, entry) for detail in details
        ]
    raise refusal(path, problems)


def refusal(path: Path, problems: Sequence[str]) -> ConfigError:
    """The error of a config with these problems, each listed once."""
    return ConfigError("\n  ".join([f"config {path} cannot be used:", *dict.fromkeys(problems)]))
