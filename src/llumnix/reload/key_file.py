"""The file of --keys: API keys with names, roles and limits. It may be read again while the server
runs."""

import difflib
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Collection
from typing import Any

from llumnix.config import check_keys
from llumnix.core.keys import ROLES, KeyLimits, NamedKey
from llumnix.errors import UsageError
from llumnix.files.strict_yaml import read_yaml

LIMITS = ("requests_per_min", "tokens_per_min", "open_max")
FIELDS = ("key", "sha256", "roles", "class", *LIMITS)
NAMES_MAX = 1000
FLAG = "--keys"


class KeyRing:
    """The keys, as the file had them when it was read last; none without a file. `classes` are the
    names of the deployment's classes of requests."""

    def __init__(self, path: str | None = None, classes: Collection[str] = ()) -> None:
        self.path = path
        self._classes = tuple(classes)
        self._by_digest: dict[bytes, NamedKey] = {}
        self.others: frozenset[bytes] = frozenset()  # digests of keys that are given elsewhere
        self.on_change: Callable[[], None] | None = None  # called once keys are others

    def __bool__(self) -> bool:
        return self.path is not None

    @property
    def keys(self) -> tuple[NamedKey, ...]:
        """All of them."""
        return tuple(self._by_digest.values())

    def find(self, digest: bytes) -> NamedKey | None:
        """The key with that digest. Timing tells nothing, since nobody can choose a digest."""
        return self._by_digest.get(digest)

    def read(self) -> tuple[NamedKey, ...]:
        """What the file says now; `UsageError` without a file, or with a bad one."""
        if self.path is None:
            raise UsageError("there is nothing to read again: the server has no --keys file")
        keys = read_key_file(self.path, self._classes)
        twice = next((k.name for k in keys if k.digest in self.others), None)
        if twice is not None:
            raise UsageError(f"{FLAG} {self.path}: {twice} is an --api-key or admin key, too")
        return keys

    def replace(self, keys: Collection[NamedKey]) -> dict[str, Any]:
        """These are the keys from now on. Returns what that changes, by names."""
        before = {k.name: k for k in self.keys}
        now = {k.name: k for k in keys}
        self._by_digest = {k.digest: k for k in keys}
        if self.on_change is not None:
            self.on_change()
        return {
            "keys": len(now),
            "added": sorted(now.keys() - before),
            "removed": sorted(before.keys() - now),
            "changed": sorted(n for n in now.keys() & before if now[n] != before[n]),
        }


def read_key_file(path: str, classes: Collection[str]) -> tuple[NamedKey, ...]:
    """The keys in a file. `UsageError` names the key's name and the fix, and never a key."""
    where = f"{FLAG} {path}"
    tree = read_yaml(path, where)
    mode = os.stat(path).st_mode
    if mode & stat.S_IROTH:
        raise UsageError(f"{where} can be read by every user here: chmod 600 it")
    if not isinstance(tree, dict) or not tree:
        raise UsageError(f"{where}: write `NAME: {{key: KEY, roles: [inference]}}` a line")
    if len(tree) > NAMES_MAX:
        raise UsageError(f"{where} has {len(tree)} keys; there may be {NAMES_MAX}")
    keys = tuple(
        _key(where, number, str(name), value, classes)
        for number, (name, value) in enumerate(tree.items(), 1)
    )
    names: dict[bytes, str] = {}
    for key in keys:
        if key.digest in names:
            raise UsageError(f"{where}: {key.name} and {names[key.digest]} have the same key")
        names[key.digest] = key.name
    return keys


def _key(file: str, number: int, name: str, tree: Any, classes: Collection[str]) -> NamedKey:
    # What stands at a wrong place may be the key, so it is not told. Nor is a name before it is
    # known to be one: `KEY: high` is how a scheduler's `key_caps` are written.
    if not isinstance(tree, dict):
        raise UsageError(
            f"{file}: entry {number}: write {{key: KEY, roles: [inference]}} after the name"
        )
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise UsageError(
            f"{file}: entry {number}: a name has letters, digits and . _ - @, at most 64"
        )
    where = f"{file}: {name}"
    if (strange := next((str(given) for given in tree if given not in FIELDS), None)) is not None:
        near = difflib.get_close_matches(strange, FIELDS, 1)
        hint = f"did you mean {near[0]}?" if near else "is there a space after each colon?"
        raise UsageError(f"{where}: a field's name is none of {', '.join(FIELDS)}; {hint}")
    roles = tree.get("roles", [ROLES[0]])
    if not isinstance(roles, list) or not roles or set(map(str, roles)) - set(ROLES):
        raise UsageError(f"{where}: roles is a list of some of: {', '.join(ROLES)}")
    cap = tree.get("class")
    if cap is not None and cap not in classes:
        raise UsageError(f"{where}: no such class; there are: {', '.join(classes)}")
    return NamedKey(
        name=name,
        digest=_digest(where, tree),
        roles=tuple(r for r in ROLES if r in roles),
        cap=cap,
        limits=KeyLimits(**{n: _limit(where, n, tree[n]) for n in LIMITS if n in tree}),
    )


def _digest(where: str, tree: dict[str, Any]) -> bytes:
    key, digest = tree.get("key"), tree.get("sha256")
    if (key is None) == (digest is None):
        raise UsageError(f"{where}: give one of key and sha256 (`printf %s KEY | sha256sum`)")
    if key is not None:
        if not isinstance(key, str):
            raise UsageError(f"{where}: put the key in quotes")
        (key,) = check_keys([key], where)
        return hashlib.sha256(key.encode()).digest()
    if not re.fullmatch(r"[0-9a-fA-F]{64}", str(digest)):
        raise UsageError(f"{where}: sha256 has 64 hexadecimal digits (`printf %s KEY | sha256sum`)")
    return bytes.fromhex(str(digest))


def _limit(where: str, name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value <= sys.float_info.max):  # so neither .inf nor .nan
        raise UsageError(f"{where}: {name} must be a number above 0; leave it out for no limit")
    if name == "open_max" and value < 1:
        raise UsageError(f"{where}: open_max must be 1 or more; leave it out for no limit")
    return float(value)
