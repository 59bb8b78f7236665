"""Output files: refused before the work where they cannot be written, and never left half written."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class OutputError(Exception):
    """A file could not be written after the work was done, e.g. on a full disk."""


def check_output(path: Path) -> None:
    """Raise ValueError unless a file can be written at ``path``, which may exist."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: the folder {folder} does not exist; create it, or name another")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: the folder {folder} is not writable; name another")
    if path.exists() and not path.is_file():  # os.replace would put a file in the place of /dev/stdout
        raise ValueError(f"{path} cannot be written: it is no regular file; name another")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder to write to. It replaces ``path`` if the block ends well, else it is deleted.

    Raises:
        OutputError: the operating system refused a write in the block.
    """
    target = path.resolve()  # the file that a link points to, not the link
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, target)
    except OSError as error:
        raise OutputError(f"{path} was not written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``document``; a NaN or infinity in it becomes null.

    Raises:
        OutputError: it could not be written.
    """
    with replacing(path) as part:
        part.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
