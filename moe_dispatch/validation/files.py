"""Output files: refused before the work where they cannot be written, and never left half written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """A path in the same folder to write to; it replaces ``path`` if the block ends well, else it goes."""
    path = path.resolve()  # the file that a link points to, not the link
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
