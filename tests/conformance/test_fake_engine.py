"""The scenarios on the engine without a model."""

import pytest

from conformance.engines import FakeKind
from conformance.scenarios import FAULTS, MOMENTS, strike


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("depth", [0, 1])
def test_a_migration_stands(fault: str, moment: type, depth: int) -> None:
    strike(FakeKind(depth), fault, moment)
