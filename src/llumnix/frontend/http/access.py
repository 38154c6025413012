"""Who may do what on one server: API keys, routes of administrators, and guards against web pages
on a server without keys.

The lists name the routes that an ordinary key may use. Every other route, known or not, needs an
administrator. tests/house/test_vllm_routes.py compares the lists with vLLM's own routes.
"""

import hashlib
import ipaddress
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from llumnix.frontend.door.probes import PROBE_PATHS

OPEN_PATHS = ("/health", *PROBE_PATHS)
PAGE_PATH = "/llumnix/ui"
"""The page that shows the deployment. Its files hold no data, and it asks for a key itself."""
READS = ("GET", "HEAD", "OPTIONS")
ANY = "*"

CLIENT_PATHS = frozenset({
    "/classify", "/detokenize", "/docs", "/docs/oauth2-redirect", "/generative_scoring", "/health",
    "/inference/v1/generate", "/invocations", "/load", "/metrics", "/openapi.json", "/ping",
    "/pooling", "/redoc", "/rerank", "/score", "/tokenize", "/tokenizer_info", "/version",
    "/llumnix/docs", "/llumnix/docs/oauth2-redirect", "/llumnix/openapi.json",
})  # fmt: skip
CLIENT_READS = frozenset({"/llumnix/v1/instances"})
CLIENT_TREES = ("/cohere/", "/static/", "/v1/", "/v2/")
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class Role(IntEnum):
    """What a caller may do; each includes the ones before."""

    STRANGER = 0
    CLIENT = 1
    ADMIN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The sender of a request."""

    role: Role
    key: str | None = field(repr=False)  # the API key that it sent
    proved: bool  # whether that key is one of the server's


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request is turned away."""

    status: int
    reason: str  # for programs
    message: str  # for users


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The rules of one server. It keeps only digests of keys."""

    client_digests: tuple[bytes, ...] = field(repr=False)
    admin_digests: tuple[bytes, ...] = field(repr=False)
    clients_administer: bool  # whether clients administer if there is no admin key
    hosts: frozenset[str] | None  # its further names, for requests without a key; None: any
    origins: tuple[str, ...]  # web origins whose pages may use the server

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """The caller by its `Authorization: Bearer` or its `x-api-key`, as Anthropic's clients
        send it."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token if scheme.lower() == "bearer" else ""
        presented = [key for key in (bearer, headers.get("x-api-key", "")) if key]
        best = Caller(role=Role.STRANGER, key=presented[0] if presented else None, proved=False)
        for key in presented:
            role = self._role(key)
            if role > best.role:
                best = Caller(role=role, key=key, proved=True)
        role = best.role
        if role is Role.STRANGER and not self.client_digests:
            role = Role.CLIENT
        if role is Role.CLIENT and not self.admin_digests and self.clients_administer:
            role = Role.ADMIN
        return Caller(role=role, key=best.key, proved=best.proved)

    def _role(self, key: str) -> Role:
        found = digest(key)
        if _among(found, self.admin_digests):
            return Role.ADMIN
        return Role.CLIENT if _among(found, self.client_digests) else Role.STRANGER

    def refusal(
        self, method: str, path: str, headers: Mapping[str, str], caller: Caller
    ) -> Refusal | None:
        """Why this request is refused; None if it may pass. For a WebSocket, `method` is no method
        of HTTP's."""
        if path in OPEN_PATHS or _is_page(method, path):
            return None
        administers = needs_admin(method, path)
        if caller.role is Role.STRANGER or (
            administers and self.admin_digests and not caller.proved
        ):
            return Refusal(status=401, reason="invalid_api_key", message="Unauthorized")
        if not caller.proved:
            refusal = self._page_refusal(method, headers, administers)
            if refusal is not None:
                return refusal
        if administers and caller.role is not Role.ADMIN:
            fix = (
                "use an admin key"
                if self.admin_digests
                else "this server has none, so start it with --admin-api-key"
            )
            return Refusal(
                status=403,
                reason="admin_key_required",
                message=f"{method} {path} is for administrators: {fix}.",
            )
        return None

    def _page_refusal(
        self, method: str, headers: Mapping[str, str], administers: bool
    ) -> Refusal | None:
        """Why a request without a key is refused if it may be a web page's, which a user of this
        machine visits. Such a page may have a name of its own resolve to this machine. Or it may
        send from its own origin what a browser sends without asking first."""
        host = headers.get("host", "")
        if self.hosts is not None and not _is_own(host, self.hosts):
            return Refusal(
                status=403,
                reason="host_not_allowed",
                message=f"Not addressed to this server: Host {host}. Start it with --allowed-host "
                "NAME if that is its name, or with --api-key.",
            )
        origin = headers.get("origin")
        if method in READS or origin is None or self._welcome(origin, host, administers):
            return None
        if not administers and is_json(headers):
            return None  # A browser asks first before it sends JSON to another origin.
        return Refusal(
            status=403,
            reason="foreign_origin",
            message=f"Not from a page of another origin: {origin}. Start the server with "
            "--allowed-origins if that page may use it.",
        )

    def _welcome(self, origin: str, host: str, administers: bool) -> bool:
        if origin.partition("://")[2].lower() == host.lower() or origin in self.origins:
            return True
        return ANY in self.origins and not administers


def needs_admin(method: str, path: str) -> bool:
    """Whether the route concerns the server or other clients' requests."""
    path = path.rstrip("/") or "/"
    # The router's patterns end in "$", which also matches before a final line break.
    if path in ADMIN_PATHS or "\n" in path:
        return True
    if path in CLIENT_PATHS or (path in CLIENT_READS and method in READS):
        return False
    return not path.startswith(CLIENT_TREES)


def _is_page(method: str, path: str) -> bool:
    """Whether that reads a file of the page."""
    return method in ("GET", "HEAD") and (path == PAGE_PATH or path.startswith(PAGE_PATH + "/"))


def digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    """The digest of each key."""
    return tuple(digest(key) for key in keys)


def digest(key: str) -> bytes:
    """The form in which a key is kept. All have one length, so that comparing reveals no key's
    length."""
    return hashlib.sha256(key.encode()).digest()


def _among(found: bytes, known: tuple[bytes, ...]) -> bool:
    """Whether a digest is one of those known. Takes the same time for each."""
    match = False
    for each in known:
        match |= secrets.compare_digest(found, each)
    return match


def _is_own(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header names this machine or one of `names`. Addresses and names without a dot
    pass, since no stranger's name server answers for them. Every browser sends the header."""
    if host.startswith("["):
        name = host[1:].partition("]")[0]
    else:
        name = host.partition(":")[0].rstrip(".").lower()
    if "." not in name or name.endswith(".localhost") or name in names or ANY in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_json(headers: Mapping[str, str]) -> bool:
    """Whether the headers say that the body is JSON. A browser asks the server before it sends JSON
    to another origin."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json"
