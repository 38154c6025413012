"""The site of `make docs` needs no network."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("material")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "scripts" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("url", "src"), [("a.html", "mermaid.js"), ("b/a.html", "../mermaid.js")])
def test_a_page_with_diagrams_loads_the_sites_own_mermaid(
    hooks: ModuleType, url: str, src: str
) -> None:
    page = SimpleNamespace(url=url)
    assert hooks.on_page_content("<p>x</p>", page=page) == "<p>x</p>"
    html = '<pre class="mermaid"><code>stateDiagram-v2</code></pre>'
    assert hooks.on_page_content(html, page=page) == f'{html}\n<script src="{src}"></script>'


def test_the_sites_own_mermaid_is_what_a_browser_runs(hooks: ModuleType) -> None:
    assert hooks._mermaid().read_text().rstrip().endswith(
        'globalThis["mermaid"] = globalThis.__esbuild_esm_mermaid_nm["mermaid"].default;'
    )  # fmt: skip


def test_the_theme_fetches_mermaid_only_where_there_is_none() -> None:
    material = importlib.util.find_spec("material")
    assert material is not None
    assert material.origin is not None
    (bundle,) = Path(material.origin).parent.glob("templates/assets/javascripts/bundle.*.js")
    fetched = re.findall(r".{75}\w+\(\"https://unpkg.com/mermaid@", bundle.read_text())
    assert len(fetched) == 1
    assert 'return typeof mermaid=="undefined"||mermaid instanceof Element?' in fetched[0]
