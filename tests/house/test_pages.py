"""README and docs/: what they name is there, and they stay short."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "llumnix"
RESULTS = ROOT / "benchmarks" / "results"
LINES_MAX = {
    "README.md": 124,
    "CONTRIBUTING.md": 82,
    "docs/answers.md": 110,
    "docs/architecture.md": 250,
    "docs/commands.md": 80,
    "docs/compatibility.md": 120,
    "docs/configuration.md": 80,
    "docs/logs.md": 80,
    "docs/deploying.md": 200,
    "docs/figures.md": 225,
    "docs/getting-started.md": 120,
    "docs/keys.md": 80,
    "docs/laboratory.md": 720,
    "docs/long_prompts.md": 100,
    "docs/metrics.md": 130,
    "docs/migration.md": 245,
    "docs/operating.md": 340,
    "docs/paper.md": 150,
    "docs/scheduling.md": 240,
    "docs/simulator.md": 150,
    "docs/slices.md": 140,
    "docs/survival.md": 120,
}
"""A page has a reader, who has so much time. Grow one on purpose, or cut it."""
WORDS_MAX = 40
PROVENANCE = ("command", "commit", "date", "machine", "versions", "rows")
NO_RESULT = {"live/paced_profile.json"}
"""What a benchmark is given, not what it measured."""


def page(name: str) -> str:
    return (ROOT / name).read_text()


def sentences(text: str) -> list[str]:
    """Of prose, lists and tables written by hand. Code, and what stands between inline marks or is
    a link's target, is one word at most."""
    text = re.sub(r"<!-- ([^:>]+): drawn -->.*?<!-- \1: end -->", "\n\n", text, flags=re.S)
    text = re.sub(r"^ *```.*?^ *```", "\n\n", text, flags=re.S | re.M)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^(#+ .*|\|[-| ]+\|)$", "\n", text, flags=re.M)
    text = re.sub(r"^ *([-*]|\d+\.) ", "\n\n", text, flags=re.M)
    text = re.sub(r"^\||\|$| \| ", "\n\n", text, flags=re.M)
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [s for part in parts for s in re.split(r"(?<=[.!?])[*)]* ", part)]


@pytest.mark.parametrize("name", LINES_MAX)
def test_a_page_is_as_long_as_its_reader_has_time(name: str) -> None:
    assert len(page(name).splitlines()) <= LINES_MAX[name]


def test_every_page_has_a_length() -> None:
    pages = {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")}
    assert pages == {name for name in LINES_MAX if name.startswith("docs/")}


@pytest.mark.parametrize("name", LINES_MAX)
def test_a_sentence_has_no_more_than_forty_words(name: str) -> None:
    found = sentences(page(name))
    assert [s for s in found if len(re.findall(r"\S*\w\S*", s)) > WORDS_MAX] == []


def test_raw_figures_say_where_they_come_from() -> None:
    results = [p for p in RESULTS.rglob("*.json") if str(p.relative_to(RESULTS)) not in NO_RESULT]
    lacking = {
        p.name: missing
        for p in results
        if (missing := [k for k in PROVENANCE if k not in json.loads(p.read_text())])
    }
    assert lacking == {}


def test_every_raw_figure_is_named_by_a_page_and_every_name_is_there() -> None:
    text = "".join(page(name) for name in LINES_MAX)
    named = set(re.findall(r"benchmarks/results/([\w./-]+\.(?:json|log))", text))
    there = {str(p.relative_to(RESULTS)) for p in RESULTS.rglob("*.*")}
    assert named == there


def test_every_picture_is_shown_and_has_words_for_those_who_cannot_see_it() -> None:
    text = "".join(page(name) for name in LINES_MAX)
    named = set(re.findall(r"\(?(?:docs/)?([\w-]+\.png)\)", text))
    assert named == {p.name for p in (ROOT / "docs").glob("*.png")}
    assert "![](" not in text


def test_every_picture_is_drawn_by_a_command_that_a_page_or_its_script_names() -> None:
    told = page("docs/laboratory.md") + "".join(
        (ROOT / "benchmarks" / f"plot_{of}.py").read_text() for of in ("memory", "migration")
    )
    told += (ROOT / "scripts" / "shoot_page.py").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.png") if f"docs/{p.name}" not in told] == []


def test_every_source_file_that_a_page_names_is_there() -> None:
    missing = []
    for name in LINES_MAX:
        paths = re.findall(r"`((?:[a-z]+/)*[\w-]+\.(?:py|sh|toml|yml))`", page(name))
        folders = (ROOT / "src/llumnix", ROOT / "benchmarks/gpu", ROOT / "benchmarks", ROOT)
        folders += (ROOT / "src/llumnix/core/migration", ROOT / "tests/house")
        missing += [p for p in paths if not any((folder / p).is_file() for folder in folders)]
    assert missing == []


def defined(name: str) -> str:
    """What defines a name of Python."""
    return rf"(?m)^ *(?:async def|def|class) {name}\b"


def test_where_something_is_decided_is_where_the_architecture_says() -> None:
    found = re.findall(r"`([a-z/_]+\.py)` \(`(\w+)`\)", page("docs/architecture.md"))
    assert len(found) > 6
    missing = [
        (path, name)
        for path, name in found
        if not re.search(defined(name), (SOURCE / path).read_text())
    ]
    assert missing == []


def test_the_page_on_logs_has_every_event_and_its_fields() -> None:
    rows = page("docs/logs.md").partition("| `event` | fields |")[2].partition("\n\n")[0]
    told: dict[str, str] = {}
    for first, rest in re.findall(r"(?m)^\| (`[^|]+) \| (.+) \|$", rows):
        told |= dict.fromkeys(re.findall(r"`(\w+)`", first), rest)
    wrong, seen = [], set()
    for path in sorted(SOURCE.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) != "about":
                continue
            event = ast.literal_eval(call.args[0])
            seen.add(event)
            wrong += [(event, k.arg) for k in call.keywords if f"`{k.arg}`" not in told[event]]
    assert (wrong, set(told) - seen) == ([], set())


def test_the_architecture_names_every_room() -> None:
    rows = page("docs/architecture.md").partition("## Rooms")[2].partition("## ")[0]
    rooms = {str(p.parent.relative_to(SOURCE)) for p in SOURCE.glob("*/**/__init__.py")}
    named = set(re.findall(r"`([a-z/]+)/`", rows))
    named |= {f"sim/{part}" for part in re.findall(r"`([a-z]+)/`", rows)} & rooms
    assert rooms - named == set()


def test_files_that_rely_on_vllms_internals_are_where_the_architecture_says() -> None:
    rows = page("docs/architecture.md").partition("## vLLM's internals")[2].partition("## ")[0]
    missing = []
    for line in rows.splitlines():
        room = Path()
        for folder, names in re.findall(r"`([a-z]+)/`:((?: `\w+`)+)", line):
            room = Path(folder) if (SOURCE / folder).is_dir() else Path(room.parts[0], folder)
            missing += [
                f"{room}/{name}.py"
                for name in re.findall(r"\w+", names)
                if not (SOURCE / room / f"{name}.py").is_file()
            ]
    assert missing == []


OTHERS_CONSTANTS = {"VLLM_BATCH_INVARIANT", "HF_TOKEN", "S3_SECRET_ACCESS_KEY"}


@pytest.mark.parametrize("name", LINES_MAX)
def test_every_constant_and_variable_that_a_page_names_is_in_the_code(name: str) -> None:
    code = "".join(
        p.read_text()
        for folder in ("src", "scripts", "tests")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".sh") and p.name != Path(__file__).name
    )
    quoted = " ".join(re.findall(r"`([^`\n/]+)`", page(name)))
    named = set(re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b", quoted)) - OTHERS_CONSTANTS
    assert [n for n in sorted(named) if n not in code] == []


def test_a_raw_figure_names_a_commit_that_is_in_the_history() -> None:
    commits = {
        json.loads(p.read_text())["commit"]
        for p in RESULTS.rglob("*.json")
        if str(p.relative_to(RESULTS)) not in NO_RESULT
    }
    known = subprocess.run(
        ["git", "log", "--format=%H"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if len(known) < 100:
        pytest.skip("a checkout without its history")
    assert [c for c in sorted(commits) if not any(k.startswith(c) for k in known)] == []
