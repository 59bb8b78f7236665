"""From a TOML file to the tables of a validate run, or to all that is wrong with it."""

from pathlib import Path
from typing import Any, TypeVar

from ...desk.config_file import checked, read_toml, refusal
from .rules import broken_rules, broken_rules_of_matrix
from .tables import ULYSSES, HfConfig, SubjectConfig, ValidateConfig

Matrix = TypeVar("Matrix", SubjectConfig, HfConfig)

# A row without one of these keys takes the value of this table.
DEFAULT_OF_ROW = (("batch", "train"), ("seq", "train"))
DEFAULT_OF_DEBUG_ROW = (*DEFAULT_OF_ROW, ("heads", "model"))


def load_config(path: Path) -> ValidateConfig:
    """The config of a TOML file, of the debug model; a row without ``batch`` or ``seq`` takes those of ``[train]``,
    without ``keep`` what its scheme does by default.

    Raises:
        ConfigError: a file that cannot be read, is no TOML, or breaks rules, which are then all listed.
    """
    table = read_toml(path)
    _fill_rows(table, DEFAULT_OF_DEBUG_ROW)
    _fill_keep(table)
    config = checked(ValidateConfig, table, path, entry="row")
    if problems := broken_rules(config):
        raise refusal(path, problems)
    return config


def load_matrix(path: Path, kind: type[Matrix]) -> Matrix:
    """:func:`load_config` of any other subject: without ``[model]``.

    Args:
        kind: which rows it has.
    """
    table = read_toml(path)
    if "model" in table:
        raise refusal(
            path, ["[model] is of the debug model, not of a subject; leave it out, or leave out --subject and --hf"]
        )
    _fill_rows(table, DEFAULT_OF_ROW)
    config = checked(kind, table, path, entry="row")
    if problems := broken_rules_of_matrix(config):
        raise refusal(path, problems)
    return config


def _fill_rows(table: dict[str, Any], defaults: tuple[tuple[str, str], ...]) -> None:
    rows = table.get("rows")
    for row in rows if isinstance(rows, list) else []:
        for key, source in defaults:
            if isinstance(row, dict):
                values = table.get(source)
                value = values.get(key) if isinstance(values, dict) else None
                # 1 in place of a wrong value: that is then one problem, of its own table
                row.setdefault(key, value if type(value) is int and value >= 1 else 1)


def _fill_keep(table: dict[str, Any]) -> None:
    rows = table.get("rows")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            row.setdefault("keep", row.get("scheme", ULYSSES) == ULYSSES)
