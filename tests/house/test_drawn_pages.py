"""What the pages show of code and raw figures is what these say today."""

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from llumnix.core.migration.tables import DESTINATION, SOURCE
from llumnix.core.streams.states import STREAM
from llumnix.core.supervision.lifecycle import LIFE

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "draw_pages.py"
SHALLOW = subprocess.run(
    ["git", "rev-parse", "--is-shallow-repository"],
    cwd=SCRIPT.parent, capture_output=True, text=True, check=False,
)  # fmt: skip
needs_history = pytest.mark.skipif(
    SHALLOW.stdout.strip() != "false", reason="ages of raw figures are counted in the history"
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_pages", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(script: ModuleType, tmp_path: Path) -> Path:
    """A copy of the pages."""
    (tmp_path / "docs").mkdir()
    for page in script.pages():
        (tmp_path / page.relative_to(script.ROOT)).write_text(page.read_text())
    return tmp_path


@needs_history
def test_the_pages_are_up_to_date(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0, "run python scripts/draw_pages.py"


@needs_history
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("docs/migration.md", "reserving --> between_stages", "reserving --> copying"),
        (
            "docs/scheduling.md",
            "| `migration.interval_s` | 0.05 |",
            "| `migration.interval_s` | 5 |",
        ),
        ("docs/figures.md", "| one a second | 0.9 |", "| one a second | 9.0 |"),
    ],
)
def test_a_page_that_is_out_of_date_is_found_and_drawn_again(
    script: ModuleType,
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    old: str,
    new: str,
) -> None:
    page = copy / name
    today = page.read_text()
    page.write_text(today.replace(old, new, 1))
    assert script.main(["--check"], copy) == 1
    assert "run python scripts/draw_pages.py" in capsys.readouterr().err
    assert page.read_text() != today
    assert script.main([], copy) == 0
    assert page.read_text() == today


def test_a_marker_without_an_end_is_refused(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="lacks the marker <!-- source: end -->"):
        script.drawn("# Migration\n<!-- source: drawn -->\n")


def test_a_marker_of_nothing_is_refused(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="nothing is called 'sourse'"):
        script.drawn("<!-- sourse: drawn -->\n<!-- sourse: end -->")


def test_every_drawing_is_on_a_page(script: ModuleType) -> None:
    found = {name for page in script.pages() for name in script.MARKER.findall(page.read_text())}
    assert found == set(script.DRAWINGS)


def test_every_state_is_drawn(script: ModuleType) -> None:
    for name, table in (
        ("source", SOURCE),
        ("destination", DESTINATION),
        ("stream", STREAM),
        ("life", LIFE),
    ):
        drawing = script.DRAWINGS[name]()
        for state in table:
            name = state.value.replace(" ", "_")
            assert f"{name} --> " in drawing or f"| {state.value} |" in drawing
        events = {event.value for row in table.values() for event in row}
        assert {e for e in events if not re.search(rf"\b{e}\b", drawing)} == set()
