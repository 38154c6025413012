"""The scenarios on the engine without a model."""

import pytest

from conformance.engines import FakeKind
from conformance.scenarios import FAULTS, KILLED_AFTER, MOMENTS, frontend_dies, outlive, strike


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("depth", [0, 1])
def test_a_migration_stands(fault: str, moment: type, depth: int) -> None:
    strike(FakeKind(depth), fault, moment)


@pytest.mark.parametrize("name", KILLED_AFTER)
@pytest.mark.parametrize("unheard", [0, 2])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_outlives_its_engines(name: str, unheard: int, depth: int) -> None:
    outlive(FakeKind(depth), name, unheard=unheard)


@pytest.mark.parametrize("depth", [0, 1])
def test_of_a_dead_frontend_nothing_is_left(depth: int) -> None:
    frontend_dies(FakeKind(depth))
