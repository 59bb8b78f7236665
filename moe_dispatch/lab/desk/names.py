"""Names that a user typed, looked up among those that there are."""

import difflib
from collections.abc import Iterable, Sequence


def choices(wrong: str, names: Iterable[str]) -> str:
    """The names, and the one that was probably meant."""
    names = list(names)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.4)
    return ", ".join(repr(name) for name in names) + (f" (did you mean {near[0]!r}?)" if near else "")


def chosen_names(wanted: Sequence[str] | None, names: Sequence[str], *, what: str) -> Sequence[str]:
    """``wanted``, or all ``names`` where the user gave none.

    Args:
        what: what the names are of, for the error, e.g. "row".

    Raises:
        ValueError: a wanted name that is none of ``names``.
    """
    for name in wanted or ():
        if name not in names:
            raise ValueError(f"no {what} of the config is named {name!r}; choose from: {choices(name, names)}")
    return wanted or names
