"""What the site has beyond docs/: README as its index, CONTRIBUTING, CHANGELOG, raw figures.

Pages are written to be read in the repository, so that some of their links leave docs/. Each is
turned towards a copy of its file in the site. A file that is not there stays as it is, and the
strict build refuses it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
CSS = """
.md-grid { max-width: 76rem; }
.md-typeset table:not([class]) th { min-width: 2rem; }
.md-typeset table:not([class]) th, .md-typeset table:not([class]) td { padding: 0.5em 0.8em; }
"""
"""Room for tables with many columns."""
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def _turned(text: str, turn: Callable[[str], str]) -> str:
    """The page with each link of its own turned."""

    def one(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        return found[0] if "://" in target else f"{before}{turn(target)}{after}"

    return LINK.sub(one, text)


def _from_root(target: str) -> str:
    """A link of a page that stands beside docs/."""
    return PAGES.get(target, target.removeprefix("docs/"))


def _from_docs(target: str) -> str:
    """A link of a page in docs/."""
    inside = target.removeprefix("../")
    return PAGES.get(inside, inside) if target.startswith("../") else target


def on_files(files: Files, config: Any) -> Files:
    """Adds what stands outside docs/."""
    files.append(File.generated(config, "site.css", content=CSS))
    for name, place in PAGES.items():
        text = _turned((ROOT / name).read_text(), _from_root)
        files.append(File.generated(config, place, content=text))
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.*")):
        place = str(path.relative_to(ROOT))
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns the links of pages in docs/."""
    return markdown if page.file.generated_by else _turned(markdown, _from_docs)
