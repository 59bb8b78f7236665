"""One problem that pydantic found in a config, as a sentence: key, fact, rule, and a value that works."""

import difflib
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

Location = Sequence[str | int]  # of a value in a table, as pydantic gives it
WORDS: tuple[tuple[Any, str], ...] = (
    (bool, "true or false"),
    (int, "an int"),
    (float, "a number"),
    (str, "a non-empty string"),
)


def problem_text(
    problem: str, location: Location, found: object, kind: type, table: Mapping[str, Any], entry: str
) -> str:
    """The sentence.

    Args:
        problem: pydantic's name for it, e.g. "missing".
        location: of the value.
        found: the value.
        kind: the pydantic dataclass of the whole table.
        table: all of the config.
        entry: what an entry of a list of tables is called, e.g. "row".
    """
    steps, keys, field, annotation = _resolved(location, kind)
    key = _key(steps, table, entry)
    if problem == "unexpected_keyword_argument":
        near = difflib.get_close_matches(str(steps[-1]), keys, n=1)
        return f"{key} is not a known key; " + (
            f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(keys)}"
        )
    fact = "is missing" if problem == "missing" else f"is {found!r}"
    if field is None:
        return f"{key} {fact}; it has to be {_rule_of_entry(annotation)}"
    return f"{key} {fact}; it has to be {_rule(field, problem)}, e.g. {_example(str(steps[-1]), field)}"


def _resolved(location: Location, kind: type) -> tuple[list[str | int], list[str], FieldInfo | None, Any]:
    """What ``location`` leads to.

    Returns:
        its steps, without those that name the member of a union; the keys of the table that the last step is in; the
        field of that key, None for an entry of a list or a key that is not known; and the type there.
    """
    steps: list[str | int] = []
    keys: list[str] = []
    field: FieldInfo | None = None
    annotation: Any = kind
    for step in location:
        if isinstance(annotation, UnionType):
            annotation = next(member for member in get_args(annotation) if _tag(member) == step)
            continue
        steps.append(step)
        field = None
        if fields := getattr(annotation, "__pydantic_fields__", None):
            keys = list(fields)
            field = fields.get(step)
            annotation = _of_optional(field.annotation) if field else None
        else:  # of a tuple[X, ...] or tuple[X, X], or a dict[str, X]
            annotation = get_args(annotation)[1 if get_origin(annotation) is dict else 0]
    return steps, keys, field, annotation


def _of_optional(annotation: Any) -> Any:
    """X of ``X | None``: no step of a location names it."""
    members = [member for member in get_args(annotation) if member is not NoneType]
    return members[0] if isinstance(annotation, UnionType) and len(members) == 1 else annotation


def _tag(member: Any) -> str:
    """pydantic's name for a member of a union."""
    return member.__name__ if get_origin(member) is None else str(member)


def _key(steps: Location, table: Mapping[str, Any], entry: str) -> str:
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
    if len(steps) > 1 and isinstance(steps[1], int):
        value = table[str(steps[0])][steps[1]]
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            key += f' ({entry} "{value["name"]}")'
    return key


def _rule(field: FieldInfo, problem: str) -> str:
    """What its values have to be. Upper limits are far from what anybody means: only who is above one hears of it."""
    if field.description:
        return field.description
    if get_origin(field.annotation) is Literal:
        *others, last = (f'"{choice}"' for choice in get_args(field.annotation))
        return f"{', '.join(others)} or {last}"
    bounds = [f"of at least {bound.ge:g}" for bound in field.metadata if hasattr(bound, "ge")]
    bounds += [f"above {bound.gt:g}" for bound in field.metadata if hasattr(bound, "gt")]
    if problem == "less_than_equal":
        bounds += [f"at most {bound.le}" for bound in field.metadata if hasattr(bound, "le")]
    return " ".join([dict(WORDS).get(field.annotation, "another value"), " and ".join(bounds)]).rstrip()


def _rule_of_entry(annotation: Any) -> str:
    """Of an entry of a list, or of a table under a key of the user's choice."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(get_args(annotation))}"
    if hasattr(annotation, "__pydantic_fields__"):
        return "a table"
    if get_origin(annotation) is tuple and ... not in get_args(annotation):
        return f"a list of {len(get_args(annotation))} numbers"
    return dict(WORDS).get(annotation, "a list")


def _example(key: str, field: FieldInfo) -> str:
    """A line of TOML that is right: the first of the field's ``examples``, which may be the head of a table."""
    example = str((field.examples or [""])[0])
    if example.startswith("[") and field.description and "table" in field.description:
        return example
    return f'{key} = "{example}"' if get_origin(field.annotation) is Literal else f"{key} = {example}"
