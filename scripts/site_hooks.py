"""What the site has beyond docs/: README as its index, CONTRIBUTING, CHANGELOG, figures, Mermaid.

Pages are written to be read in the repository, so that some of their links leave docs/. Each is
turned towards a copy of its file in the site. A file that is not there stays as it is, and the
strict build refuses it.

The theme would load Mermaid from the network unless a page has it already. So the site has a copy,
which comes with the package mermaidx, and pages with diagrams load that.
"""

import re
from collections.abc import Callable
from importlib.metadata import files as files_of
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

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
MERMAID = "mermaid.js"
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


def _linked() -> set[str]:
    """Files beside docs/ that pages link to: raw figures, patches. Paths are from the root."""
    found = set()
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in PAGES)]:
        for _, target, _ in LINK.findall(page.read_text()):
            path = (page.parent / target).resolve()
            if path.is_file() and path.is_relative_to(ROOT):
                found.add(str(path.relative_to(ROOT)))
    return {place for place in found if place not in PAGES and not place.startswith("docs/")}


def _mermaid() -> Path:
    """The copy in the package, which need not be imported."""
    found = [f for f in files_of("mermaidx") or () if f.name == MERMAID]
    return Path(found[0].locate())  # type: ignore[arg-type]


def on_files(files: Files, config: Any) -> Files:
    """Adds what stands outside docs/."""
    files.append(File.generated(config, "site.css", content=CSS))
    files.append(File.generated(config, MERMAID, abs_src_path=str(_mermaid())))
    for name, place in PAGES.items():
        text = _turned((ROOT / name).read_text(), _from_root)
        files.append(File.generated(config, place, content=text))
    for place in sorted(_linked()):
        files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns the links of pages in docs/."""
    return markdown if page.file.generated_by else _turned(markdown, _from_docs)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Has a page with diagrams load Mermaid before the theme's own script looks for it."""
    if 'class="mermaid"' not in html:
        return html
    return f'{html}\n<script src="{get_relative_url(MERMAID, page.url)}"></script>'
