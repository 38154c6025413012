"""The same scenarios on vLLM's engine: the double and the real thing behave alike."""

import pytest

from conformance.engines import RealKind
from conformance.scenarios import FAULTS, MOMENTS, strike

pytestmark = pytest.mark.live


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_migration_stands(real: RealKind, fault: str, moment: type) -> None:
    strike(real, fault, moment)
