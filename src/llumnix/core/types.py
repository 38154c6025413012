"""Identities that every part of llumnix shares."""

from typing import NewType

InstanceId = NewType("InstanceId", str)
"""Names one instance for as long as it is wanted, over restarts: `i0`, `i1`, ..."""

EngineIndex = NewType("EngineIndex", int)
"""Numbers one *run* of an instance's engine. Never used twice, so a message of a dead engine can
be told from one of its successor. 16 bits: it is also the engine's ZMQ identity."""

RequestId = NewType("RequestId", str)
"""vLLM's internal id of one sequence: unique over all frontends (it ends in random hex digits)."""

MigrationId = NewType("MigrationId", str)
"""Names one attempt to move one request: `m0`, `m1`, ... by the frontend that grants its epoch, or
`m3-0`, ... if that has the client index 3. Unique over frontends."""

Epoch = NewType("Epoch", int)
"""Counts the owners that a request has had or may get. Granted by its frontend alone."""

OrderId = NewType("OrderId", int)
"""Numbers the orders of one run of the scheduler to move load."""

ENGINE_INDEX_MAX = 2**16 - 1
