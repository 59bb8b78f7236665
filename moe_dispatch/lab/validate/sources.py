"""Where subjects come from: the debug model of a config, or a user's file or package."""

import hashlib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from ...judge.subject import Subject, problem_of_subject
from .config.spreading import BY_ULYSSES, Spreading
from .config.tables import ModelConfig, SubjectConfig, ValidateConfig
from .debug_model.subject import DebugSubject
from .rows import Row

FORM = "FILE.py:NAME, package.module:NAME, or either without :NAME for a module of functions"


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugSource:
    """The debug model."""

    config: ModelConfig
    seed: int
    spreading: Spreading = field(compare=False)  # one process has none

    @property
    def is_users(self) -> bool:
        return False

    @property
    def told(self) -> str:
        return "the debug model"

    def load(self) -> Subject:
        return DebugSubject(config=self.config, seed=self.seed, spreading=self.spreading)


@dataclass(frozen=True, slots=True)
class UserSource:
    """What ``--subject`` names.

    Attributes:
        spec: as given.
        digest: SHA-256 of the module's file: joined ranks have to have the same one.
    """

    spec: str
    digest: str

    @classmethod
    def of(cls, spec: str) -> "UserSource":
        """Checked: it can be imported, and has what a subject needs.

        Raises:
            ValueError: fact, rule, remedy.
        """
        subject, module = _load(spec)
        if problem := problem_of_subject(subject):
            raise ValueError(
                f"--subject {spec} cannot be judged: {problem}; see moe_dispatch.testing.Subject for what each does"
            )
        file = getattr(module, "__file__", None)
        return cls(spec, hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "")

    @property
    def is_users(self) -> bool:
        return True

    @property
    def told(self) -> str:
        return f"{self.spec}, SHA-256 {self.digest[:16]}" if self.digest else self.spec

    def load(self) -> Subject:
        return _load(self.spec)[0]


def debug_rows(config: ValidateConfig) -> list[Row]:
    """The rows of the debug model."""
    rows = []
    for row in config.rows:
        heads = [f"{row.heads} head{'' if row.heads == 1 else 's'}"] if row.heads != config.model.heads else []
        rows.append(
            Row(
                name=row.name,
                source=DebugSource(
                    config=replace(config.model, heads=row.heads), seed=config.train.seed, spreading=row.spreading
                ),
                layout=row.layout,
                one_head=row.heads == 1,
                spreading=row.spreading,
                special=", ".join([*heads, *row.special()]),
            )
        )
    return rows


def rows_of_user(config: SubjectConfig, source: UserSource) -> Sequence[Row]:
    """The rows of a user's subject."""
    return [
        Row(
            name=row.name,
            source=source,
            layout=row.layout,
            one_head=False,
            spreading=BY_ULYSSES,
            special=", ".join(row.special()),
        )
        for row in config.rows
    ]


def _load(spec: str) -> tuple[Any, ModuleType]:
    """The subject that ``spec`` names, and its module."""
    where, _, name = spec.partition(":")
    module = _module_of_file(Path(where), spec) if where.endswith(".py") else _module(where, spec)
    if not name:
        return module, module
    if not hasattr(module, name):
        raise ValueError(f"--subject {spec}: {where} has no {name}; it has to be {FORM}")
    found = getattr(module, name)
    if not isinstance(found, type):
        return found, module
    try:
        return found(), module
    except TypeError as error:
        raise ValueError(f"--subject {spec}: {name}() failed ({error}); it is made without arguments") from error


def _module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--subject {spec} cannot be imported ({error}); it has to be {FORM}") from error


def _module_of_file(path: Path, spec: str) -> ModuleType:
    """The module of a file, imported once in each process: what it defines can then be pickled in it."""
    path = path.resolve()
    name = f"subject_of_validate_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise ValueError(f"--subject {spec}: there is no file {path}; it has to be {FORM}")
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path)
    try:
        SourceFileLoader(name, str(path)).exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"--subject {spec}: {path} cannot be imported ({type(error).__name__}: {error})") from error
    return module
