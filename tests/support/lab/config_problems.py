"""The problems that a config of `validate` is refused with."""

from pathlib import Path

import pytest

from moe_dispatch.lab.desk.config_file import ConfigError
from moe_dispatch.lab.validate.config.load import load_config


def problems_of(tmp_path: Path, text: str) -> list[str]:
    """The lines below the first of the error that ``text`` gets."""
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    first, *problems = str(error.value).splitlines()
    assert first == f"config {path} cannot be used:"
    return [problem.strip() for problem in problems]
