"""Config files by path, or by name: those of a tool are in the folder ``configs/TOOL``."""

from pathlib import Path

from .names import choices

PACKAGE = Path(__file__).parents[2]
CONFIG_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")  # of a wheel, of a checkout


def find_config(name: str, *, tool: str, what: str = "config") -> Path:
    """The file at the path ``name``, else the packaged one of that name.

    ``tiny``, ``tiny.toml``, ``configs/tiny.toml`` and ``configs/validate/tiny.toml`` name the same packaged one.

    Args:
        tool: the folder of packaged configs to look in.
        what: what the tool calls its configs, for the error.

    Raises:
        ValueError: there is none.
    """
    given = Path(name)
    if given.is_file():
        return given
    files = [path for folder in reversed(CONFIG_FOLDERS) for path in sorted((folder / tool).glob("*.toml"))]
    packaged = {path.stem: path for path in files}
    folders = (Path(), Path("configs"), Path("configs", tool))
    if given.parent in folders and given.suffix in ("", ".toml") and given.stem in packaged:
        return packaged[given.stem]
    fact = "is a directory" if given.is_dir() else "is no regular file" if given.exists() else "does not exist"
    raise ValueError(f"config {name} {fact}; name a TOML file, or a packaged {what}: {choices(given.stem, packaged)}")
