"""Models of Transformers as subjects: what ``--hf`` names. Transformers is imported where one is made, only."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ...judge.subject import Subject
from . import EVERY_TYPE
from .config.spreading import BY_ULYSSES
from .config.tables import HfConfig
from .rows import Row

if TYPE_CHECKING:
    from sp_attention.integrations.transformers.judged import TransformersSubject


@dataclass(frozen=True, slots=True)
class HfSource:
    """What ``--hf`` names.

    Attributes:
        what: as given: a model type, a config.json or a folder.
        digest: of the config's file, and of names and sizes of weights: joined ranks have to have the same.
        ep_implementation: who moves rows to experts.
    """

    what: str
    digest: str
    ep_implementation: str = field(compare=False)  # one process has none

    @classmethod
    def of(cls, what: str) -> "HfSource":
        """Checked: the model is made and cut once, on one rank that is a thread.

        Raises:
            ValueError: fact, rule, remedy.
        """
        from sp_attention.integrations.transformers.judged import problem_of_subject_over_ranks, subject_of

        if problem := problem_of_subject_over_ranks(subject_of(what)):
            raise ValueError(problem)
        return cls(what, cls.digest_of(what), "moe_dispatch")

    @staticmethod
    def digest_of(what: str) -> str:
        """Of a file, or of a folder's config and its files; empty for a name."""
        path, found = Path(what), hashlib.sha256()
        if not path.exists():
            return ""
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            is_text = file.suffix == ".json"
            found.update(file.read_bytes() if is_text else f"{file.name} {file.stat().st_size}".encode())
        return found.hexdigest()

    @property
    def is_users(self) -> bool:
        return True

    @property
    def told(self) -> str:
        digest = f", SHA-256 {self.digest[:16]}" if self.digest else ""
        return f"{self.what} of Transformers {version('transformers')}{digest}"

    def load(self) -> Subject:
        return self.subject()

    def subject(self) -> "TransformersSubject":
        from sp_attention.integrations.transformers.judged import subject_of

        return subject_of(self.what, ep_implementation=self.ep_implementation)


def rows_of_hf(config: HfConfig, what: str) -> tuple[Sequence[Row], Sequence[str]]:
    """The rows of ``what`` that can run, and notes: what the model is, and of each other row why it is left out.

    Raises:
        ValueError: it cannot be judged.
    """
    if what == EVERY_TYPE:
        return _rows_of_every_type(config)
    source = HfSource.of(what)
    rows, left_out = _rows(config, source, "")
    return rows, [source.subject().told, *left_out]


def _rows_of_every_type(config: HfConfig) -> tuple[Sequence[Row], Sequence[str]]:
    """The rows of every type that is not refused, and why others are."""
    from sp_attention.integrations.transformers.judged import causal_moe_types

    rows: list[Row] = []
    notes: list[str] = []
    types = causal_moe_types()
    for kind in types:
        try:
            of_kind, left_out = _rows(config, HfSource.of(kind), f"{kind}, ")
        except ValueError as error:
            notes.append(f"{kind} is refused: {error}")
        else:
            rows += of_kind
            notes += left_out
    judged, release = len({row.source for row in rows}), version("transformers")
    told = f"Transformers {release} has {len(types)} causal types with experts, of which {judged} can be judged"
    return rows, [told, *notes]


def _rows(config: HfConfig, source: HfSource, prefix: str) -> tuple[Sequence[Row], Sequence[str]]:
    rows: list[Row] = []
    left_out: list[str] = []
    for row in config.rows:
        name, of_row = f"{prefix}{row.name}", HfSource(source.what, source.digest, row.ep_implementation)
        if problem := of_row.subject().problem_in(row.layout):
            left_out.append(f"{name} is left out: {problem}")
            continue
        special = ", ".join(row.special())
        rows.append(
            Row(
                name=name,
                source=of_row,
                layout=row.layout,
                one_head=False,
                spreading=BY_ULYSSES,
                special=special,
            )
        )
    return rows, left_out
