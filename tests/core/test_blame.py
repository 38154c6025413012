"""Which ends of an engine a request may have caused."""

import signal

import pytest

from llumnix.core.codes import DeathCode
from llumnix.core.supervision.blame import Traces, code_of, is_blamed


@pytest.mark.parametrize(
    ("traces", "blamed"),
    [
        (Traces(), False),  # SIGKILL, SIGTERM, the host's loss: nothing is left.
        (Traces(raised=True), True),
        (Traces(crashed=True), True),
        (Traces(out_of_memory=True), True),
        # The engine fails because of its worker.
        (Traces(raised=True, worker_exit=-signal.SIGSEGV), True),
        (Traces(raised=True, worker_exit=-signal.SIGABRT), True),
        (Traces(raised=True, worker_exit=1), True),
        (Traces(worker_exit=-signal.SIGBUS), True),
        (Traces(raised=True, worker_exit=-signal.SIGKILL), False),
        (Traces(raised=True, worker_exit=-signal.SIGTERM), False),
        (Traces(raised=True, worker_exit=0), False),
        (Traces(raised=True, worker_exit=-signal.SIGKILL, out_of_memory=True), True),
    ],
)
def test_only_an_end_of_its_own_making_is_blamed(traces: Traces, blamed: bool) -> None:
    assert is_blamed(traces) is blamed


@pytest.mark.parametrize(
    ("traces", "code"),
    [
        (Traces(), DeathCode.SIGNAL),  # It is gone, and nothing else is known.
        (Traces(raised=True), DeathCode.EXIT),
        (Traces(crashed=True), DeathCode.SIGNAL),
        (Traces(raised=True, out_of_memory=True), DeathCode.OOM),
        (Traces(raised=True, worker_exit=1), DeathCode.EXIT),
        (Traces(raised=True, worker_exit=-signal.SIGSEGV), DeathCode.SIGNAL),
    ],
)
def test_an_end_has_one_code(traces: Traces, code: DeathCode) -> None:
    assert code_of(traces) is code
