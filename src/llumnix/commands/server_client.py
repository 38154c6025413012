"""Asks a running server, for the commands that do so."""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llumnix.errors import LlumnixError, UsageError

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
UNIX = "unix:"
CONNECT_TIMEOUT_S = 5.0
PATIENCE_S, PAUSE_S = 60.0, 0.5
"""So long a server may not answer a command that waits for something, and so often it is asked."""
SILENCE_S = 15.0
"""A feed of events tells something every second."""
_OUR_ERRORS = ("invalid_request_error", "forbidden", "service_unavailable", "rate_limit_error")


def server_parser(command: str) -> argparse.ArgumentParser:
    """The flags of every command that asks a running server."""
    parser = argparse.ArgumentParser(prog=f"llumnix {command}")
    parser.add_argument(
        "--url",
        default=os.environ.get("LLUMNIX_URL") or DEFAULT_URL,
        help="of the server, or unix:PATH of its socket; default: $LLUMNIX_URL, else "
        + DEFAULT_URL,
    )
    parser.add_argument("--uds", metavar="PATH", help="the same as --url unix:PATH")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="if it wants one; default: $LLUMNIX_ADMIN_API_KEY, else $VLLM_API_KEY",
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="file whose first key is taken")
    parser.add_argument("--cacert", metavar="FILE", help="certificates to trust for https")
    parser.add_argument("--json", action="store_true", help="the server's answer as it is")
    return parser


def _key(args: argparse.Namespace) -> str | None:
    """The key to send, if any."""
    from llumnix.config import ADMIN_API_KEY_VARIABLE, API_KEY_VARIABLE, check_keys, read_keys

    if args.api_key is not None:
        return check_keys([args.api_key], "--api-key")[0]
    if args.api_key_file is not None:
        return read_keys(args.api_key_file, "--api-key-file")[0]
    for variable in (ADMIN_API_KEY_VARIABLE, API_KEY_VARIABLE):
        if key := os.environ.get(variable):
            return check_keys([key], f"${variable}")[0]
    return None


def _client(args: argparse.Namespace, timeout_s: float) -> "httpx.Client":
    """A client that sends the key. A server on this machine is asked directly, whatever proxies the
    environment names: they could not reach it, and would see the key."""
    import ssl

    import httpx

    from llumnix.config import is_loopback

    url = httpx.URL("http://localhost" if args.url.startswith(UNIX) else args.url.rstrip("/"))
    here = args.url.startswith(UNIX) or is_loopback(url.host) or url.host in ("0.0.0.0", "::")
    key = _key(args)
    try:
        # Certificates are loaded for https alone.
        verify: ssl.SSLContext | bool = url.scheme == "https"
        if args.cacert is not None:
            verify = ssl.create_default_context(cafile=args.cacert)
        transport = None
        if here:
            socket = args.url.removeprefix(UNIX) if args.url.startswith(UNIX) else None
            transport = httpx.HTTPTransport(verify=verify, uds=socket)
        return httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            verify=verify,
        )
    except OSError as error:
        where = args.cacert or "the certificates that the environment names"
        raise UsageError(f"--cacert: {where} cannot be read ({error.strerror or error})") from error
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        raise UsageError(
            f"the environment's proxies cannot be used ({error}): mend HTTP_PROXY, HTTPS_PROXY, "
            "ALL_PROXY and NO_PROXY, or unset them"
        ) from error


class NobodyError(UsageError):
    """No server answers."""


class BusyError(LlumnixError):
    """The server, or a proxy before it, cannot answer now."""


def ask(
    args: argparse.Namespace,
    method: str,
    path: str,
    content: dict[str, Any] | None = None,
    *,
    wanted: str,
    timeout_s: float,
    silence: str | None = None,
) -> dict[str, Any]:
    """The server's answer, a JSON object with the field `wanted`. Else `UsageError`, which says
    what to mend or has the server's own message. `silence` says what it means if the request was
    sent and no answer came."""
    import httpx

    if args.uds is not None:
        args.url = UNIX + args.uds
    unanswered = (httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError)
    try:
        with _client(args, timeout_s) as client:
            answer = client.request(method, path, json=content)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        if silence is not None and isinstance(error, unanswered):
            raise LlumnixError(f"no answer from {args.url} ({error}): {silence}") from error
        raise _nobody(args, error) from error
    body = _json_of(answer)
    if answer.status_code in (200, 202) and isinstance(body, dict) and wanted in body:
        return body
    raise _refused(args, answer)


def follow(args: argparse.Namespace, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a feed, each with its name, until the server ends it. Errors are those of
    `ask`."""
    import httpx

    if args.uds is not None:
        args.url = UNIX + args.uds
    try:
        with _client(args, SILENCE_S) as client, client.stream("GET", path) as answer:
            kind = answer.headers.get("content-type", "")
            if answer.status_code != 200 or not kind.startswith("text/event-stream"):
                answer.read()
                raise _refused(args, answer)
            event = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    event = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield event, json.loads(line.removeprefix("data: "))
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise _nobody(args, error) from error


def ask_again(
    args: argparse.Namespace, path: str, *, wanted: str, timeout_s: float
) -> dict[str, Any]:
    """The same by GET, for a command that waits for something: a server that is busy for a while is
    asked again, for `PATIENCE_S`."""
    return with_patience(lambda: ask(args, "GET", path, wanted=wanted, timeout_s=timeout_s))


def with_patience(
    attempt: Callable[[], dict[str, Any]],
    unless: Callable[[], dict[str, Any] | None] = lambda: None,
) -> dict[str, Any]:
    """Tries again for `PATIENCE_S` while nobody answers, or a server that is busy. `unless`: looks
    before each further attempt whether it is still wanted; what it returns is the result then."""
    began_s = time.monotonic()
    while True:
        try:
            return attempt()
        except (NobodyError, BusyError):
            if time.monotonic() > began_s + PATIENCE_S:
                raise
            time.sleep(PAUSE_S)
        if (found := unless()) is not None:
            return found


def _nobody(args: argparse.Namespace, error: Exception) -> UsageError:
    return NobodyError(
        f"no llumnix answers at {args.url} ({error}): start `llumnix serve`, or give --url"
    )


def _json_of(answer: "httpx.Response") -> Any:
    try:
        return answer.json()
    except ValueError:
        return None


def _refused(args: argparse.Namespace, answer: "httpx.Response") -> LlumnixError:
    """What an answer means that is not the one that was asked for."""
    if answer.status_code == 401:
        a = "another" if "authorization" in answer.request.headers else "a"
        return UsageError(f"the server wants {a} key: give --api-key KEY or --api-key-file FILE")
    body = _json_of(answer)
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and error.get("type") in _OUR_ERRORS:
        kind = UsageError if answer.status_code < 500 else BusyError
        return kind(str(error.get("message")))
    if answer.status_code >= 500:
        return BusyError(f"{args.url} failed (status {answer.status_code}); its log says why")
    return UsageError(f"{args.url} is no llumnix server (status {answer.status_code})")
