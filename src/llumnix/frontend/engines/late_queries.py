"""Which engine holds the embedding of which query, for late-interaction scoring.

A query is embedded once, and its embedding stays in the memory of one engine. The documents that
are scored against it must go to that engine, whichever others have come or gone since.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`get_late_interaction_engine_index(params, n)` is the checksum of the query's key modulo `n`, or
None for a request that has nothing to do with this.
"""

from collections.abc import Mapping

from vllm.pooling_params import PoolingParams
from vllm.v1.pool.late_interaction import get_late_interaction_engine_index

from llumnix.core.types import EngineIndex
from llumnix.frontend.engines.engine import Engine

QUERIES_MAX = 4096
"""How many queries are remembered, the newest ones."""
_CHECKSUMS = 2**32


class LateQueries:
    """The queries of one frontend."""

    def __init__(self) -> None:
        self._engines: dict[int, EngineIndex] = {}

    def engine(
        self, params: PoolingParams | None, engines: Mapping[EngineIndex, Engine]
    ) -> Engine | None:
        """Where a request with these parameters must go; None if it may go anywhere."""
        query = get_late_interaction_engine_index(params, _CHECKSUMS)
        if query is None:
            return None
        # An engine that is being drained still scores against what it has embedded.
        known = engines.get(self._engines.pop(query, EngineIndex(-1)))
        if known is None or not known.ready.done():
            takers = [e for e in engines.values() if e.takes_requests]
            if not takers:
                return None
            known = takers[query % len(takers)]
        self._engines[query] = known.engine_index
        if len(self._engines) > QUERIES_MAX:
            del self._engines[next(iter(self._engines))]
        return known
