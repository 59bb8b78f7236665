"""Tables leave out columns until they fit, and say so; no cell is folded, and no number is cut."""

import io

import pytest
from rich.console import Console

from moe_dispatch.lab.desk.tables import FittingTable


def printed(width: int, *, name: str = "a name") -> list[str]:
    """A table of 6, 4, 4 and 7 columns; the fourth has a head of two lines."""
    table = FittingTable(
        "name", "one", "two", "far\nthree", right=("two",), first_to_go=("two", "far\nthree", "one"), below="; see b"
    )
    table.add_row(name, "1234", "12", "1234567")
    table.add_section()
    table.add_row("[red]", "4")
    console = Console(file=io.StringIO(), width=width)
    table.print(console)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_table_that_fits_is_whole() -> None:
    assert printed(26) == [
        "",
        "                   far",
        "name    one   two  three",
        "──────────────────────────",
        "a name  1234   12  1234567",
        "",
        "[red]   4",
        "",
    ]


@pytest.mark.parametrize(
    ("width", "head", "told"),
    [
        (25, "name    one   three", "Left out: two; see b"),
        (20, "name    one", "2 of 4 columns left"),
        (11, "name", "3 of 4"),
    ],
)
def test_the_least_important_columns_go_first_and_are_told(width: int, head: str, told: str) -> None:
    lines = printed(width)
    assert head in lines
    assert any(line.startswith(told) for line in lines)


@pytest.mark.parametrize("width", range(8, 46))
def test_no_line_is_wider_than_the_console_and_only_names_are_cut(width: int) -> None:
    lines = printed(width, name="a name that is long")
    assert max(map(len, lines)) <= width
    (row,) = [line for line in lines if line.startswith("a name")]
    name, *numbers = row.split("  ")
    assert "a name that is long".startswith(name.removesuffix("…").rstrip())
    assert {number.strip() for number in numbers} <= {"", "1234", "12", "1234567"}
    assert (name == "a name that is long") == (width >= 19)
