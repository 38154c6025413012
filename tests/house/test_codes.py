"""Reasons that metrics, logs and answers name: each is given somewhere."""

import enum
import inspect
import re
from typing import get_args

from llumnix.core import codes
from llumnix.core.events import DrainedBy
from llumnix.observe import metrics

from .test_pages import SOURCE


def test_every_code_is_given_somewhere() -> None:
    source = "".join(p.read_text() for p in SOURCE.rglob("*.py"))
    classes = inspect.getmembers(codes, lambda c: inspect.isclass(c) and issubclass(c, enum.Enum))
    members = [f"{name}.{m.name}" for name, one in classes for m in one]
    assert len(members) > 20
    assert [m for m in members if not re.search(rf"\b{m}\b", source)] == []


def test_a_drain_has_the_cause_of_who_asked_for_it() -> None:
    causes = metrics.FAMILIES["llumnix_drains_total"].labels["cause"]
    assert isinstance(causes, tuple)
    assert {"scheduler" if c == "scaling" else c for c in causes} == set(get_args(DrainedBy))
