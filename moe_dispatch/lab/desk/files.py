"""Packaged input files by name; output files, refused before the work where they cannot be written, never left half
written."""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def find_packaged(name: str, packaged: Mapping[str, Path], *, folder: Path, what: str) -> Path:
    """The file as given, else the packaged one of that name, with or without its ending and ``folder``.

    Raises:
        ValueError: there is none.
    """
    given = Path(name)
    if given.is_file():
        return given
    if given.parent in (Path(), folder) and given.suffix in ("", ".toml") and given.stem in packaged:
        return packaged[given.stem]
    fact = "is a directory" if given.is_dir() else "does not exist"
    raise ValueError(f"config {name} {fact}; name a TOML file, or a packaged {what}: {choices(given.stem, packaged)}")


def choices(wrong: str, names: Iterable[str]) -> str:
    """What could have been meant."""
    names = list(names)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.4)
    return ", ".join(repr(name) for name in names) + (f" (did you mean {near[0]!r}?)" if near else "")


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
