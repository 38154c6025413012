"""Who may do what on one server: API keys, routes of administrators, and guards against web pages
on a server without keys.

The lists name the routes that an ordinary key may use. Every other route, known or not, needs an
administrator. tests/house/test_vllm_routes.py compares the lists with vLLM's own routes.
"""

import hashlib
import ipaddress
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntFlag

from llumnix.core.keys import NamedKey
from llumnix.frontend.door.probes import PROBE_PATHS
from llumnix.reload.key_file import KeyRing

OPEN_PATHS = ("/health", *PROBE_PATHS)
PAGE_PATH = "/llumnix/ui"
"""The page that shows the deployment. Its files hold no data, and it asks for a key itself."""
READS = ("GET", "HEAD", "OPTIONS")
ANY = "*"

MODEL_PATHS = frozenset({
    "/classify", "/detokenize", "/generative_scoring", "/inference/v1/generate", "/invocations",
    "/pooling", "/rerank", "/score", "/tokenize", "/tokenizer_info",
})  # fmt: skip
SERVER_PATHS = frozenset({
    "/docs", "/docs/oauth2-redirect", "/health", "/load", "/metrics", "/openapi.json", "/ping",
    "/redoc", "/version", "/llumnix/docs", "/llumnix/docs/oauth2-redirect", "/llumnix/openapi.json",
})  # fmt: skip
"""What any key may read of the server."""
CLIENT_PATHS = MODEL_PATHS | SERVER_PATHS
CLIENT_READS = frozenset({"/llumnix/v1/instances"})
VIEW_TREE = "/llumnix/v1/"
"""What may be read there shows the whole deployment."""
CLIENT_TREES = ("/cohere/", "/static/", "/v1/", "/v2/")
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class Role(IntFlag):
    """What a caller may do. A key may have several; an administrator may do everything."""

    STRANGER = 0
    CLIENT = 1  # use the model
    VIEW = 2  # see what the deployment does
    ADMIN = 4


ROLE_OF = {"inference": Role.CLIENT, "view": Role.VIEW, "admin": Role.ADMIN}
"""By its name in the file of --keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The sender of a request."""

    role: Role
    key: str | None = field(repr=False)  # the API key that it sent
    proved: bool  # whether that key is one of the server's
    named: NamedKey | None = None  # what the file of --keys says of it


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
    ring: KeyRing = field(default_factory=KeyRing)  # keys of the file of --keys

    @property
    def keyed(self) -> bool:
        """Whether those who use the model need a key."""
        return bool(self.client_digests or self.ring)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """The caller by its `Authorization: Bearer` or its `x-api-key`, as Anthropic's clients
        send it."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token if scheme.lower() == "bearer" else ""
        presented = [key for key in (bearer, headers.get("x-api-key", "")) if key]
        best = Caller(role=Role.STRANGER, key=presented[0] if presented else None, proved=False)
        for key in presented:
            role, named = self._role(key)
            if role > best.role:
                best = Caller(role=role, key=key, proved=True, named=named)
        role = best.role
        if role == Role.STRANGER and not self.keyed:
            role = Role.CLIENT
        if (
            role == Role.CLIENT
            and self.clients_administer
            and not (self.admin_digests or self.ring)
        ):
            role = Role.ADMIN
        return replace(best, role=role)

    def _role(self, key: str) -> tuple[Role, NamedKey | None]:
        found = digest(key)
        if _among(found, self.admin_digests):
            return Role.ADMIN, None
        if _among(found, self.client_digests):
            return Role.CLIENT, None
        named, role = self.ring.find(found), Role.STRANGER
        for name in () if named is None else named.roles:
            role |= ROLE_OF[name]
        return role, named

    def refusal(
        self, method: str, path: str, headers: Mapping[str, str], caller: Caller
    ) -> Refusal | None:
        """Why this request is refused; None if it may pass. For a WebSocket, `method` is no method
        of HTTP's."""
        if path in OPEN_PATHS or _is_page(method, path):
            return None
        administers, wanted = needs_admin(method, path), roles_for(method, path)
        guarded = self.admin_digests or self.ring
        if caller.role == Role.STRANGER or (administers and guarded and not caller.proved):
            return Refusal(status=401, reason="invalid_api_key", message="Unauthorized")
        if not caller.proved:
            refusal = self._page_refusal(method, headers, administers)
            if refusal is not None:
                return refusal
        if caller.role & (wanted | Role.ADMIN):
            return None
        if wanted & Role.CLIENT:
            return Refusal(
                status=403,
                reason="role_required",
                message=f"{method} {path} is for keys with the role `inference`.",
            )
        if administers:
            fix = (
                "use an admin key"
                if guarded
                else "this server has none, so start it with --admin-api-key"
            )
            if guarded and wanted & Role.VIEW:
                fix += ", or one with the role `view`"
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


def roles_for(method: str, path: str) -> Role:
    """Who may use the route, beside administrators."""
    path, reads = path.rstrip("/") or "/", method in READS
    if needs_admin(method, path):
        sees = reads and path.startswith(VIEW_TREE) and "\n" not in path
        return Role.VIEW if sees else Role.ADMIN
    if path in SERVER_PATHS or (path in CLIENT_READS and reads):
        return Role.CLIENT | Role.VIEW
    return Role.CLIENT


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
