"""Rules of the house that no tool checks."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import llumnix
from llumnix.config import knobs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_our_flags_are_these() -> None:
    """A flag is a promise: add one here on purpose. vLLM's own are vLLM's to declare."""
    assert {name: default for name, default, _ in knobs()} == {
        "instances": 2,
        "policy": None,
        "min_instances": None,
        "max_instances": None,
        "priority_class": None,
        "queue_max": None,
        "scheduler_config": None,
        "survival": None,
        "ray_address": None,
        "ray_wait": 0.0,
        "event_log": None,
        "event_log_max_mb": 1000,
        "log_format": "text",
        "log_dir": None,
        "migration_bandwidth": None,
        "insecure": False,
        "api_key_file": None,
        "admin_api_key": None,
        "admin_api_key_file": None,
        "keys": None,
        "allowed_host": None,
        "max_body_mb": 64,
        "max_stream_interval": 8,
        "ready_min": 1,
        "lame_duck": 0.0,
        "metrics_port": None,
        "metrics_host": "127.0.0.1",
        "metrics_open": False,
        "no_ui": False,
    }


def test_every_flag_is_in_the_page_for_operators() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    missing = [n for n, _, _ in knobs() if "--" + n.replace("_", "-") not in page]
    assert missing == []


def test_a_file_is_one_sitting() -> None:
    long = {f.name: n for f in SOURCES if (n := len(f.read_text().splitlines())) > 400}
    assert long == {}


def test_a_function_fits_a_screen() -> None:
    nodes = ((f, node) for f in SOURCES for node in ast.walk(ast.parse(f.read_text())))
    functions = ((f, n) for f, n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    long = [(f.name, n.name) for f, n in functions if (n.end_lineno or 0) - n.lineno >= 60]
    assert long == []


def test_a_room_has_at_most_twelve_files() -> None:
    rooms = Counter(str(f.parent) for f in SOURCES if f.name != "__init__.py")
    assert {name: n for name, n in rooms.items() if n > 12} == {}


def test_a_room_says_in_one_sentence_what_is_found_there_and_exports_nothing() -> None:
    rooms = [f for f in SOURCES if f.name == "__init__.py" and f.parent.name != "llumnix"]
    others = [f for f in rooms if not re.fullmatch(r'"""[^\n]+\."""\n', f.read_text())]
    assert others == []


def test_every_file_says_what_it_is() -> None:
    silent = [f.name for f in SOURCES if not re.match(r'"""\S', f.read_text())]
    assert silent == ["__main__.py"]


def test_the_version_is_one() -> None:
    assert f'version = "{llumnix.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {llumnix.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_change_stands_twice_in_the_changelog() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    begun = Counter(line for line in lines if line.startswith("- "))
    assert [line for line, times in begun.items() if times > 1] == []


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    texts = [p for p in (ROOT / "docs").glob("*.md")] + [ROOT / "README.md", *SOURCES]
    found = [p.name for p in texts if re.search(r"/(home|root|Users)/\w", p.read_text())]
    assert found == []


SCRIPTS = [p for top in ("benchmarks", "scripts") for p in sorted((ROOT / top).rglob("*.py"))]


def names_in(path: Path) -> set[str]:
    """What a file defines or imports at its top."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom() | ast.Import():
                found |= {(each.asname or each.name).partition(".")[0] for each in node.names}
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_script_imports_of_ours_is_there(script: Path) -> None:
    """No test runs most of them, and mypy does not read them."""
    beside = Counter(path.stem for path in SCRIPTS)  # Two folders may have one of that name.
    missing = []
    for node in ast.walk(ast.parse(script.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        names = [each.name for each in node.names]
        if node.module.partition(".")[0] == "llumnix":
            path = ROOT / "src" / node.module.replace(".", "/")
            here = names_in(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
            here |= {each.stem for each in path.glob("*.py")}
        elif node.module in beside:
            here = set().union(*(names_in(p) for p in SCRIPTS if p.stem == node.module))
        else:
            continue
        missing += [f"{node.module}.{name}" for name in names if name not in here]
    assert missing == []
