"""What a mutant puts in place of a function takes the same arguments."""

import inspect
from pkgutil import resolve_name
from typing import Any

import pytest

from moe_dispatch.lab.validate.mutants.mutants import MUTANTS


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_has_the_arguments_of_what_it_replaces(name: str) -> None:
    """All but ``self``, which it calls what it is."""
    right: Any = resolve_name(MUTANTS[name].target.replace(":", "."))
    right = right.fget if isinstance(right, property) else right
    wrong = MUTANTS[name].wrong(right)
    ours, theirs = (
        [(argument.name, argument.kind) for argument in inspect.signature(function).parameters.values()]
        for function in (wrong, right)
    )
    is_method = theirs[0][0] == "self"
    assert ours[is_method:] == theirs[is_method:]
