"""Who calls, for all that a call does: set by the front that lets it in, read where it matters who it was."""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from expertmesh.cluster.api_keys import ApiKey, Role
from expertmesh.cluster.rate_limits import Limits, RateLimiter

# In metrics, and as the owner of streams, of whoever has no key. No key has this name.
ANONYMOUS = "-"


@dataclass(eq=False, kw_only=True, slots=True)
class Caller:
    """A key, or whoever has none, and what it has used. All that it sends share one."""

    name: str = ANONYMOUS
    role: Role = Role.INFERENCE
    weight: float = 1.0
    limiter: RateLimiter = field(default_factory=lambda: RateLimiter(Limits()))
    clock: Callable[[], float] = time.monotonic

    def follow(self, key: ApiKey) -> None:
        """Have the role, weight and limits of a key; what was used stays used."""
        self.name, self.role, self.weight = key.name, key.role, key.weight
        if self.limiter.limits != key.limits:
            self.limiter.set_limits(key.limits, self.clock())


# Each call is a task with a context of its own, and the tasks that it begins have a copy.
CALLER: ContextVar[Caller] = ContextVar("caller")


def caller_name() -> str:
    """Return the name of the key that the call at hand came with."""
    caller = CALLER.get(None)
    return ANONYMOUS if caller is None else caller.name
