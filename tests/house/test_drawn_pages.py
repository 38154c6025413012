"""What docs/ shows of the code is what the code says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from llumnix.core.migration.tables import DESTINATION, SOURCE
from llumnix.core.streams.states import STREAM
from llumnix.core.supervision.lifecycle import LIFE

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "draw_pages.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_pages", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def docs(script: ModuleType, tmp_path: Path) -> Path:
    """A copy of the pages."""
    for name in script.PAGES:
        (tmp_path / name).write_text((script.DOCS / name).read_text())
    return tmp_path


def test_the_pages_are_up_to_date(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0, "run python scripts/draw_pages.py"


def test_a_page_that_is_out_of_date_is_found_and_drawn_again(
    script: ModuleType, docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, old, new in (
        ("migration.md", "reserving --> idle", "reserving --> copying"),
        ("scheduler.md", "| `migration.tick_s` | 0.05 |", "| `migration.tick_s` | 5 |"),
    ):
        page = docs / name
        today = page.read_text()
        page.write_text(today.replace(old, new, 1))
        assert script.main(["--check"], docs) == 1
        assert "run python scripts/draw_pages.py" in capsys.readouterr().err
        assert page.read_text() != today
        assert script.main([], docs) == 0
        assert page.read_text() == today


def test_a_page_without_markers_is_refused(script: ModuleType, docs: Path) -> None:
    (docs / "migration.md").write_text("# Migration\n")
    with pytest.raises(ValueError, match="lacks the markers <!-- source: drawn -->"):
        script.main([], docs)


def test_every_state_is_drawn(script: ModuleType) -> None:
    for name, table in (
        ("source", SOURCE),
        ("destination", DESTINATION),
        ("stream", STREAM),
        ("life", LIFE),
    ):
        drawing = script.drawings()[name]
        for state in table:
            assert f"{state.value} --> " in drawing
