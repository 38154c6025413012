"""The diagrams in docs/migration.md are those of the tables."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from llumnix.core.migration import DESTINATION, SOURCE

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "draw_protocol.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_protocol", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_diagrams_are_up_to_date(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0, "run python scripts/draw_protocol.py"


def test_a_diagram_that_is_out_of_date_is_found_and_drawn_again(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    today = script.PAGE.read_text()
    page = tmp_path / "migration.md"
    page.write_text(today.replace("reserving --> idle", "reserving --> copying", 1))
    assert script.main(["--check"], page) == 1
    assert "run python scripts/draw_protocol.py" in capsys.readouterr().err
    assert page.read_text() != today
    assert script.main([], page) == 0
    assert page.read_text() == today


def test_a_page_without_markers_is_refused(script: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "migration.md"
    page.write_text("# Migration\n")
    with pytest.raises(ValueError, match="lacks the markers <!-- source: drawn -->"):
        script.main([], page)


def test_every_state_is_drawn(script: ModuleType) -> None:
    for name, table in (("source", SOURCE), ("destination", DESTINATION)):
        drawing = script.drawings()[name]
        for state in table:
            assert f"{state.value} --> " in drawing
