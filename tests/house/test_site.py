"""The site of `make docs` needs no network."""

import importlib.util
import re
import subprocess
import sys
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


def test_the_strict_build_takes_every_page_and_link(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_beside_the_pages_is_of_the_site_where_a_page_links_to_it(
    hooks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "a.patch").write_text("")
    (tmp_path / "docs" / "a.md").write_text(
        "[a](../benchmarks/a.patch), [b](../benchmarks/b.patch), [c](a.md), [d](../../../x)"
    )
    for name in hooks.PAGES:
        (tmp_path / name).write_text("[a](docs/a.md) [b](https://example.org/a.patch)")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    assert hooks._linked() == {"benchmarks/a.patch"}
