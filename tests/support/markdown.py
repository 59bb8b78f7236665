"""What a Markdown page shows: its fenced blocks, and where its links go."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "DESIGN.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fences(page: Path, language: str) -> list[str]:
    """The insides of the page's blocks of that language, each with its last line end."""
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """The targets of the page's links, but those to other machines."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target for target in targets if "://" not in target]


def anchors(page: Path) -> set[str]:
    """What a link can point to inside of the page: its headings as GitHub names them, and MyST targets."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    named = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return named | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
