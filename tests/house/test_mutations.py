"""tests/house/mutations.toml fits the code and the tests of today."""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutate = load()
MUTATIONS = mutate.mutations()


@cache
def functions_of(path: str) -> frozenset[str]:
    """Those of a file of tests; none if it is not there."""
    if not (ROOT / path).is_file():
        return frozenset()
    tree = ast.parse((ROOT / path).read_text())
    functions = (n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(f.name for f in functions)


def is_there(test: str) -> bool:
    """Whether this id names a test function. Parameters in it are not looked at."""
    path, _, name = test.partition("[")[0].partition("::")
    return name.startswith("test_") and name in functions_of(path)


def test_each_mutation_has_a_name_of_its_own() -> None:
    names = [m.name for m in MUTATIONS]
    assert len(names) == len(set(names)) >= 16


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_applies_and_the_result_is_python(mutation: "mutate.Mutation") -> None:
    assert mutation.why_stale(ROOT) is None
    assert mutation.old != mutation.new
    text = (ROOT / mutation.file).read_text()
    ast.parse(text.replace(mutation.old, mutation.new))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_names_tests_that_are_there(mutation: "mutate.Mutation") -> None:
    assert mutation.noticed_by
    assert [test for test in mutation.noticed_by if not is_there(test)] == []


def test_a_mutation_whose_lines_have_changed_is_stale(tmp_path: Path) -> None:
    one = mutate.Mutation(name="n", file="a.py", old="x = 1\n", new="", harm="", noticed_by=[])
    assert one.why_stale(tmp_path) == "a.py is not there"
    for text, count in (("y = 1\n", 0), ("x = 1\nx = 1\n", 2)):
        (tmp_path / "a.py").write_text(text)
        assert one.why_stale(tmp_path) == f"its old lines stand {count} times in a.py"
    (tmp_path / "a.py").write_text("x = 1\n")
    assert one.why_stale(tmp_path) is None
