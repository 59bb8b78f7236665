"""Tables that fit the terminal: columns that it has no room for are left out, and named below."""

from collections.abc import Collection, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 2  # blanks between columns
LEAST_NAME = 8  # what stays of the first column on a terminal too narrow for the rest


class FittingTable:
    """Rows under heads, in the style of the tools. No cell is folded.

    Args:
        columns: the heads; of two lines where one would be wider than what is below it.
        right: the columns that are aligned to the right.
        first_to_go: the columns that may be left out, the least important one first.
        below: what to add to the line that says what was left out, e.g. where to find it.
    """

    def __init__(
        self, *columns: str, right: Collection[str] = (), first_to_go: Sequence[str] = (), below: str = ""
    ) -> None:
        self._columns, self._right, self._first_to_go, self._below = columns, right, first_to_go, below
        self._sections: list[list[list[Text]]] = [[]]

    def add_row(self, *cells: str | Text) -> None:
        """Cells for the first of the columns; the others stay empty."""
        row = [Text(cell) if isinstance(cell, str) else cell for cell in cells]
        self._sections[-1].append(row + [Text()] * (len(self._columns) - len(row)))

    def add_section(self) -> None:
        """An empty line before the next row."""
        self._sections.append([])

    def print(self, console: Console) -> None:
        """The table between empty lines; a line below it says what was left out."""
        widths = [self._width(place) for place in range(len(self._columns))]
        shown = list(range(len(self._columns)))
        for name in self._first_to_go:
            if _total(widths, shown) <= console.width:
                break
            shown = [place for place in shown if self._columns[place] != name]
        too_wide = _total(widths, shown) - console.width
        widths[0] = max(widths[0] - max(too_wide, 0), min(widths[0], LEAST_NAME))
        console.print()
        console.print(self._table(widths, shown))
        left_out = [name for place, name in enumerate(self._columns) if place not in shown]
        if left_out:
            console.print(Text(self._told(left_out, console.width), "italic"))
        console.print()

    def _told(self, left_out: Sequence[str], width: int) -> str:
        """One line: which columns, or how many where their names do not fit into ``width``."""
        names = ", ".join(dict.fromkeys(" ".join(name.split()) for name in left_out))
        named = f"Left out: {names}{self._below}"
        count = f"{len(left_out)} of {len(self._columns)} columns left out{self._below}"
        return named if len(named) <= width else count

    def _width(self, place: int) -> int:
        cells = [row[place] for rows in self._sections for row in rows]
        return max(cell.cell_len for text in (Text(self._columns[place]), *cells) for cell in text.split("\n"))

    def _table(self, widths: Sequence[int], shown: Sequence[int]) -> Table:
        table = Table(
            header_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0)
        )
        for place in shown:
            name = self._columns[place]
            table.add_column(
                Text(name),
                justify="right" if name in self._right else "left",
                vertical="bottom",
                width=widths[place],
                no_wrap=True,
                overflow="ellipsis",
            )
        for rows in self._sections:
            for row in rows:
                table.add_row(*(row[place] for place in shown))
            table.add_section()
        return table


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[place] for place in shown) + GAP * (len(shown) - 1)
