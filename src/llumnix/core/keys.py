"""API keys that have names: what each may do, and how much of it."""

import math
from dataclasses import dataclass, field

ROLES = ("inference", "view", "admin")
"""To use the model; to see what the deployment does; to do everything."""
MINUTE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """How much a key may use. None stands for no limit."""

    requests_per_min: float | None = None
    tokens_per_min: float | None = None  # of prompts and answers
    open_max: float | None = None  # requests at a time

    def shared(self, among: int) -> "KeyLimits":
        """The part of each of so many processes. Each lets at least one request through at a
        time."""
        if among == 1:
            return self
        open_max = None if self.open_max is None else max(1.0, self.open_max // among)
        return KeyLimits(
            requests_per_min=self.requests_per_min and self.requests_per_min / among,
            tokens_per_min=self.tokens_per_min and self.tokens_per_min / among,
            open_max=open_max,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedKey:
    """One key. Of the key itself only the SHA-256 digest is kept."""

    name: str
    digest: bytes = field(repr=False)
    roles: tuple[str, ...]  # of `ROLES`
    cap: str | None = None  # the most urgent class of requests that it gets
    limits: KeyLimits = field(default_factory=KeyLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """A key has used up what it may."""

    code: str  # for programs
    message: str  # for users
    retry_after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How much of one limit is left."""

    of: str  # "requests" or "tokens"
    limit: int  # a minute
    remaining: int  # now
    reset_s: float  # until all of it is there again


class _Bucket:
    """Lets so much through a minute, and at most a minute's worth at once."""

    def __init__(self, per_min: float, now_s: float) -> None:
        self.per_min = per_min
        self._size = max(1.0, per_min)
        self._level, self._seen_s = self._size, now_s

    def level(self, now_s: float) -> float:
        """What is left."""
        # A request may have begun before another was looked at, or before the bucket was made.
        gained = max(0.0, now_s - self._seen_s) * self.per_min / MINUTE_S
        self._level = min(self._size, self._level + gained)
        self._seen_s = max(self._seen_s, now_s)
        return self._level

    def take(self, amount: float) -> None:
        self._level -= amount

    def wait_s(self, wanted: float) -> float:
        """Until so much is there."""
        return max(0.0, (wanted - self._level) * MINUTE_S / self.per_min)

    def standing(self, of: str, now_s: float) -> Standing:
        left = max(0, math.floor(self.level(now_s)))
        reset_s = self.wait_s(self._size)
        return Standing(of=of, limit=math.floor(self._size), remaining=left, reset_s=reset_s)


def _bucket(per_min: float | None, now_s: float) -> _Bucket | None:
    return None if per_min is None else _Bucket(per_min, now_s)


class KeyMeter:
    """Counts what one key uses in one process. Tokens are known when a request has ended, so they
    are charged then: a key that is over its limit waits until the debt is paid."""

    def __init__(self, limits: KeyLimits, now_s: float) -> None:
        self.limits = KeyLimits()
        self.open = 0
        self._requests: _Bucket | None = None
        self._tokens: _Bucket | None = None
        self.change(limits, now_s)

    def change(self, limits: KeyLimits, now_s: float) -> None:
        """The key has these limits from now on. What it used of those that stay counts on."""
        before, self.limits = self.limits, limits
        if limits.requests_per_min != before.requests_per_min:
            self._requests = _bucket(limits.requests_per_min, now_s)
        if limits.tokens_per_min != before.tokens_per_min:
            self._tokens = _bucket(limits.tokens_per_min, now_s)

    def admit(self, now_s: float) -> Over | None:
        """Lets a request in, or says why not. One that is let in must be told to have `ended`."""
        most, requests, tokens = self.limits.open_max, self._requests, self._tokens
        if most is not None and self.open >= most:
            message = f"This key may have {most:.0f} requests open at a time."
            return Over(code="too_many_open", message=message, retry_after_s=1.0)
        if tokens is not None and tokens.level(now_s) <= 0:
            message = f"This key may use {tokens.per_min:.0f} tokens a minute."
            return Over(code="rate_limited", message=message, retry_after_s=tokens.wait_s(1))
        if requests is not None and requests.level(now_s) < 1:
            message = f"This key may send {requests.per_min:g} requests a minute."
            return Over(code="rate_limited", message=message, retry_after_s=requests.wait_s(1))
        if requests is not None:
            requests.take(1)
        self.begun()
        return None

    def standings(self, now_s: float) -> list[Standing]:
        """How much is left of the limits by the minute. Tokens of open requests are not in yet."""
        buckets = (("requests", self._requests), ("tokens", self._tokens))
        return [each.standing(of, now_s) for of, each in buckets if each is not None]

    def begun(self) -> None:
        """A request that was let in is open, or is so again."""
        self.open += 1

    def ended(self) -> None:
        """A request that was let in is over."""
        self.open -= 1

    def spend(self, tokens: int, now_s: float) -> None:
        """A request has used so many tokens."""
        if self._tokens is not None:
            self._tokens.level(now_s)
            self._tokens.take(tokens)


class Meters:
    """One meter a key that has limits, in one of `among` processes."""

    def __init__(self, among: int) -> None:
        self._among = among
        self._meters: dict[str, KeyMeter] = {}

    def of(self, key: NamedKey | None, now_s: float) -> KeyMeter | None:
        """The meter of that key."""
        if key is None or key.limits == KeyLimits():
            return None
        limits, known = key.limits.shared(self._among), self._meters.get(key.name)
        if known is None:
            known = self._meters[key.name] = KeyMeter(limits, now_s)
        elif known.limits != limits:
            known.change(limits, now_s)
        return known
