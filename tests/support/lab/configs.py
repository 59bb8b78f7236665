"""Where the project and its packaged configs are."""

from pathlib import Path

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
TINY_TEXT = (CONFIGS / "validate" / "tiny.toml").read_text()
