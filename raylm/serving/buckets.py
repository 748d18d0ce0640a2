"""Token buckets: how many requests and how many tokens a key may still spend.

A bucket holds a minute's worth, so a key that was quiet may send a whole minute's requests at once. Tokens are known
only after they are generated, so a key may run into debt by what it had in flight; it then waits until that is paid.
"""

import math
from dataclasses import dataclass

MINUTE_S = 60.0


class Bucket:
    """Holds up to `per_minute`, and fills at that rate. Times are seconds of any clock that never goes back."""

    __slots__ = ("_at", "_balance", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._balance = float(per_minute)
        self._at = now

    def balance(self, now: float) -> float:
        """What may be spent; below 0 after more was spent than there was."""
        if now > self._at:
            self._balance = min(self.per_minute, self._balance + (now - self._at) * self.per_minute / MINUTE_S)
            self._at = now
        return self._balance

    def spend(self, amount: float, now: float) -> None:
        self._balance = self.balance(now) - amount

    def seconds_until(self, amount: float, now: float) -> float:
        """How long until the balance is `amount`, if nothing is spent meanwhile."""
        return max(0.0, (amount - self.balance(now)) * MINUTE_S / self.per_minute)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that has to wait."""

    reason: str
    retry_after_s: float


class Allowance:
    """The buckets of one key: a request needs one of its requests left, and one of its tokens."""

    __slots__ = ("_requests", "_tokens")

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None, now: float) -> None:
        self._requests = Bucket(requests_per_minute, now) if requests_per_minute else None
        self._tokens = Bucket(tokens_per_minute, now) if tokens_per_minute else None

    def admit(self, now: float) -> Refusal | None:
        """Spends one request, or says why not; a refused request costs nothing."""
        for unit, bucket in (("tokens", self._tokens), ("requests", self._requests)):
            if bucket is not None and bucket.balance(now) < 1:
                limit = f"the key's limit of {bucket.per_minute} {unit} per minute is reached"
                return Refusal(limit, bucket.seconds_until(1, now))
        if self._requests is not None:
            self._requests.spend(1, now)
        return None

    def book(self, tokens: int, now: float) -> None:
        """Spends the tokens that a request has cost."""
        if self._tokens is not None:
            self._tokens.spend(tokens, now)

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """What is left and when all of it is back, under OpenAI's names."""
        found = []
        for unit, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                left = max(0, math.floor(bucket.balance(now)))
                whole = duration(bucket.seconds_until(bucket.per_minute, now))
                for name, value in (("limit", bucket.per_minute), ("remaining", left), ("reset", whole)):
                    found.append((f"x-ratelimit-{name}-{unit}".encode(), str(value).encode()))
        return found


def duration(seconds: float) -> str:
    """As OpenAI's headers write it: `17ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < MINUTE_S:
        return f"{math.ceil(seconds * 10) / 10:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"
