"""While a prompt goes on, nothing is drawn from its request's generator."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from llumnix.engine.seeded import keep_generators


class Runner:
    """Draws from the generators it finds, and turns those back that drew in vain: which raises."""

    def __init__(self, *going_on: bool) -> None:
        self.drawn: list[str] = []
        self.discard_request_mask = SimpleNamespace(np=np.array([*going_on, True]))
        generators = {0: "a", 2: "c"}
        self.input_batch = SimpleNamespace(num_reqs=3, generators=generators)

    def _sample(self, logits: Any) -> Any:
        self.drawn += self.input_batch.generators.values()
        return logits

    def _bookkeeping_sync(self, output: Any) -> Any:
        for index in np.nonzero(self.discard_request_mask.np[:3])[0]:
            assert int(index) not in self.input_batch.generators, "no offset"
        return output


def test_who_goes_on_does_not_draw_and_has_its_generator_afterwards() -> None:
    runner: Any = Runner(True, True, False)
    keep_generators(runner)
    assert runner._bookkeeping_sync(runner._sample("x")) == "x"
    assert runner.drawn == ["c"]
    assert runner.input_batch.generators == {0: "a", 2: "c"}
    runner.discard_request_mask.np[:] = False
    runner._bookkeeping_sync(runner._sample("x"))
    assert sorted(runner.drawn) == ["a", "c", "c"]
