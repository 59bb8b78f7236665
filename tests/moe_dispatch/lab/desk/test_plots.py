"""Which files a plot can be."""

from pathlib import Path

import pytest

from moe_dispatch.lab.desk.plots import check_plot


@pytest.mark.parametrize("name", ["out", "out.txt", "out.json"])
def test_a_type_that_is_no_picture_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is no file type for a plot; .* png, .*, e\.g\. out\.png"):
        check_plot(Path(name))
