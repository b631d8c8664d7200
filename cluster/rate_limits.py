"""How much an API key may use: requests and tokens a minute, and sequences at once. Time is an argument.

Rates are token buckets (a bucket holds a minute's worth and fills evenly, so a key that paused may use a minute's worth
at once; over any t minutes it gets at most 1 + t minutes' worth): Turner, "New directions in communications (or which
way to the information age?)", IEEE Communications Magazine 24(10), 1986. The output of a request is not known
beforehand: its tokens are taken as they come and may leave the bucket in debt, which new requests wait for.
"""

from dataclasses import dataclass

from expertmesh.cluster.errors import InputError, RateLimitError

_MINUTE_S = 60.0
_ROUNDING = 1e-9  # of a bucket: who comes back when told is not refused for what rounding left out


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """None is no limit. max_concurrent counts sequences that run or wait: a request has one for each sample."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


class TokenBucket:
    """A bucket that begins full, holds `capacity` and gets that much each minute."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self._level = capacity
        self._seen_s: float | None = None

    def level(self, now_s: float) -> float:
        """Return what is in it; below 0 is debt. A clock that steps back stands still."""
        if self._seen_s is not None and now_s > self._seen_s:
            self._level = min(self.capacity, self._level + (now_s - self._seen_s) / _MINUTE_S * self.capacity)
        self._seen_s = now_s if self._seen_s is None else max(now_s, self._seen_s)
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return the seconds until it holds this amount, which is no more than its capacity."""
        missing = (amount - self.level(now_s)) / self.capacity
        return missing * _MINUTE_S if missing > _ROUNDING else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Take so much out, if need be into debt."""
        self._level = self.level(now_s) - amount

    def resize(self, capacity: float, now_s: float) -> None:
        """Hold another amount from now on; what was taken out stays taken."""
        self._level = min(capacity, self.level(now_s) + max(0.0, capacity - self.capacity))
        self.capacity = capacity


class RateLimiter:
    """What one key has used of its limits."""

    def __init__(self, limits: Limits) -> None:
        """Begin with full buckets and nothing at once."""
        self.limits = limits
        self.num_sequences = 0
        self.requests = _bucket(limits.requests_per_minute)
        self.tokens = _bucket(limits.tokens_per_minute)

    def set_limits(self, limits: Limits, now_s: float) -> None:
        """Have other limits from now on; what was used stays used."""
        self.requests = _resized(self.requests, limits.requests_per_minute, now_s)
        self.tokens = _resized(self.tokens, limits.tokens_per_minute, now_s)
        self.limits = limits

    def admit(self, *, num_sequences: int, num_prompt_tokens: int, now_s: float) -> None:
        """Count a new request, or refuse it and count nothing. `release` its sequences when it ends.

        Raises:
            RateLimitError: a limit is reached; it says when there will be room, except for sequences at once.
            InputError: the prompt or the samples alone are more than the limits ever allow.
        """
        self._require_possible(num_sequences, num_prompt_tokens)
        limit = self.limits.max_concurrent
        if limit is not None and self.num_sequences + num_sequences > limit:
            raise RateLimitError(
                f"{self.num_sequences} sequences of this API key are running or waiting and {num_sequences} more are "
                f"asked for; it may have {limit} at once"
            )
        if self.requests is not None and (wait_s := self.requests.wait_s(1, now_s)) > 0:
            raise RateLimitError(
                f"this API key may send {self.limits.requests_per_minute} requests a minute; try again in "
                f"{wait_s:.1f} s",
                retry_after_s=wait_s,
            )
        if self.tokens is not None and (wait_s := self.tokens.wait_s(num_prompt_tokens, now_s)) > 0:
            raise RateLimitError(
                f"this API key may use {self.limits.tokens_per_minute} tokens a minute, and the prompt has "
                f"{num_prompt_tokens}; try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )
        self.num_sequences += num_sequences
        if self.requests is not None:
            self.requests.take(1, now_s)
        self.spend(num_prompt_tokens, now_s)

    def spend(self, num_tokens: int, now_s: float) -> None:
        """Count tokens of output, which are there whatever the limit."""
        if self.tokens is not None:
            self.tokens.take(num_tokens, now_s)

    def release(self, num_sequences: int) -> None:
        """Note that sequences have ended."""
        self.num_sequences -= num_sequences
        assert self.num_sequences >= 0, f"{-self.num_sequences} sequences ended that never began"

    def _require_possible(self, num_sequences: int, num_prompt_tokens: int) -> None:
        limits = self.limits
        if limits.tokens_per_minute is not None and num_prompt_tokens > limits.tokens_per_minute:
            raise InputError(
                f"the prompt has {num_prompt_tokens} tokens; this API key may use {limits.tokens_per_minute} a minute",
                field="prompt",
            )
        if limits.max_concurrent is not None and num_sequences > limits.max_concurrent:
            raise InputError(
                f"n is {num_sequences}; this API key may have {limits.max_concurrent} sequences at once", field="n"
            )


def _bucket(per_minute: int | None) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute)


def _resized(bucket: TokenBucket | None, per_minute: int | None, now_s: float) -> TokenBucket | None:
    if bucket is None or per_minute is None:
        return _bucket(per_minute)
    if bucket.capacity != per_minute:
        bucket.resize(per_minute, now_s)
    return bucket
