"""The pages name bounds. Each is the code's: who changes one changes the sentence too."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "llumnix"

STATED = tomllib.loads((Path(__file__).parent / "stated_bounds.toml").read_text())["stated"]


@cache
def sentences(page: str) -> str:
    """The page with its lines joined."""
    return re.sub(r"\s+", " ", (ROOT / "docs" / f"{page}.md").read_text())


@cache
def constants(file: str) -> dict[str, ast.expr]:
    """The module's, unevaluated: the rooms import much that this test has no need of."""
    body = ast.parse((SRC / file).read_text()).body
    return {
        node.targets[0].id: node.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def number(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp):
        assert isinstance(node.op, ast.Pow)
        return number(node.left) ** number(node.right)
    return ast.literal_eval(node)


@pytest.mark.parametrize("stated", STATED, ids=lambda stated: stated["piece"])
def test_a_bound_that_a_page_states_is_the_codes(stated: dict[str, Any]) -> None:
    assert stated["piece"] in sentences(stated["page"])
    for at, value in stated["bounds"].items():
        file, name = at.split()
        assert number(constants(file)[name]) == value, at
