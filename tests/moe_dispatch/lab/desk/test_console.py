"""Progress where there is no terminal."""

import io

from rich.console import Console

from moe_dispatch.lab.desk.console import ProgressDisplay


def test_progress_is_one_plain_line_per_row_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=20)
    with ProgressDisplay(console, 2) as display:
        display.started("float64  a row with a name [red]")
        display.finished("float64  a row with a name [red]", "agree  1.0 s")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "float64  a row with a name [red]  agree  1.0 s\n"
