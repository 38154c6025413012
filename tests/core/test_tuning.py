"""The scheduler's constants say what they are, and where their values come from."""

import ast
import re
from pathlib import Path

from llumnix.core.scheduling import tuning

SOURCE = Path(tuning.__file__).read_text()
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def constants() -> dict[str, str]:
    """Each constant with the text that follows it."""
    body = ast.parse(SOURCE).body
    texts = [*map(ast.unparse, body[1:]), ""]
    found = {}
    for node, after in zip(body, texts, strict=True):
        if isinstance(node, ast.Assign):
            assert isinstance(node.targets[0], ast.Name)
            found[node.targets[0].id] = ast.literal_eval(after) if after[:1] in "'\"" else ""
    return found


def test_every_constant_has_a_unit_an_effect_and_evidence() -> None:
    known = constants()
    assert len(known) > 25
    for name, text in known.items():
        words = " ".join(text.split())
        assert re.fullmatch(r"[A-Z][^.]+\. .+ Evidence: (guess|the paper|\S+\.json)\.", words), name


def test_the_files_that_are_evidence_exist() -> None:
    named = re.findall(r"Evidence:\s(\S+\.json)", SOURCE)
    assert named
    assert [name for name in named if not (RESULTS / name).exists()] == []
