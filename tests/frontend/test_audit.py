"""Who changed what is told in the log."""

import logging
from typing import Any

import pytest

from .test_gate import KEY, application, client


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    found = [getattr(r, "llumnix", {}) for r in caplog.records]
    return [line for line in found if line.get("event") == "admin_call"]


async def test_what_an_administrator_changes_is_a_line_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="llumnix"):
        async with client(application(["secret"])) as http:
            await http.post("/llumnix/v1/instances?key=hidden", headers=KEY)
            await http.post("/pause", headers=KEY)
            # Looks, clients' own requests and what is refused are none.
            await http.get("/llumnix/v1/requests", headers=KEY)
            await http.post("/v1/completions", headers=KEY)
            await http.post("/pause")
    assert told(caplog) == [
        {"event": "admin_call", "method": "POST", "path": path, "key": None, "status": 200}
        for path in ("/llumnix/v1/instances", "/pause")
    ]
    assert "POST /pause by a key: 200" in caplog.messages
    assert "secret" not in caplog.text
    assert "hidden" not in caplog.text
