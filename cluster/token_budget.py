"""Tokens wait for their readers: how many may wait in all, and who is to go when there are more?"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from expertmesh.cluster.requests import TokenEvent


class TokenBudget:
    """Counts what is held for all readers. When that is too much, whoever holds the most gives it up.

    So a reader that takes what comes is not ended for one that reads nothing, however many of those there are: each of
    them holds more.
    """

    def __init__(self, max_tokens: int) -> None:
        """Allow this many tokens, counted as `num_tokens` does."""
        self._max_tokens = max_tokens
        self._accounts: dict[Account, None] = {}
        self.num_held = 0

    def open(self, give_up: Callable[[], None]) -> "Account":
        """Return a new account. give_up is called, and the account closed, when it is the one to go."""
        account = Account(self, give_up)
        self._accounts[account] = None
        return account

    def _change(self, account: "Account", num_tokens: int) -> None:
        if account not in self._accounts:
            return
        account.num_held += num_tokens
        self.num_held += num_tokens
        while self.num_held > self._max_tokens:
            largest = max(self._accounts, key=lambda one: one.num_held)
            largest.close()
            largest.give_up()

    def _close(self, account: "Account") -> None:
        if account in self._accounts:
            del self._accounts[account]
            self.num_held -= account.num_held


@dataclass(eq=False, slots=True)
class Account:
    """What is held for one reader. Once closed it counts nothing."""

    budget: TokenBudget
    give_up: Callable[[], None]
    num_held: int = 0

    def add(self, num_tokens: int) -> None:
        """Hold more; whoever then holds the most may have to give it up."""
        self.budget._change(self, num_tokens)

    def take(self, num_tokens: int) -> None:
        """Hold less: they were read."""
        self.budget._change(self, -num_tokens)

    def close(self) -> None:
        """Hold nothing any more."""
        self.budget._close(self)


def num_tokens(events: Iterable[TokenEvent]) -> int:
    """Count tokens, each reported alternative as one more: both take some 100 to 300 bytes of a gateway's memory."""
    return sum(1 + len(event.top_logprobs) for event in events)
