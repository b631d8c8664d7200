"""Which KV page holds what: reference-counted pages of a fixed size, reused between sequences with the same prefix.

A page is in one of four states:

    private     one owner, which may write it; not yet full, or full and not yet published
    shared      published: full, computed, never written again; one or more owners
    evictable   published, without an owner; kept for reuse, oldest use goes first when room is needed
    free        without owner and content
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from expertmesh.cluster.errors import InputError


class TokenChain:
    """The tokens of one sequence with the key of each full page; every token is hashed once.

    A page's key is a 256-bit BLAKE2b digest of the key of the page before and the page's own tokens, so equal keys mean
    equal tokens from the start of the sequence. page_size 0 keeps no keys.
    """

    __slots__ = ("_page_size", "keys", "tokens")

    def __init__(self, token_ids: Iterable[int], *, page_size: int) -> None:
        self.tokens: list[int] = list(token_ids)
        self.keys: list[bytes] = []
        self._page_size = page_size
        self._extend_keys()

    def append(self, token_id: int) -> None:
        """Add one token at the end."""
        self.tokens.append(token_id)
        self._extend_keys()

    def _extend_keys(self) -> None:
        size = self._page_size
        while size and (len(self.keys) + 1) * size <= len(self.tokens):
            start = len(self.keys) * size
            digest = blake2b(self.keys[-1] if self.keys else b"", digest_size=32)
            digest.update(array("q", self.tokens[start : start + size]).tobytes())
            self.keys.append(digest.digest())


class PagePool:
    """Hand out page numbers 0..num_pages-1, each with room for page_size tokens, and find computed prefixes again.

    A pool of 0 pages is allowed; it has nothing to give.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 0 or page_size < 0 or (num_pages > 0 and page_size == 0):
            raise InputError(f"a pool cannot have num_pages={num_pages} with page_size={page_size}")
        self._page_size = page_size
        self._num_refs = [0] * num_pages
        self._key_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_pages(self) -> int:
        """All pages."""
        return len(self._num_refs)

    @property
    def num_free(self) -> int:
        """Pages that an allocation can get: free and evictable."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Pages with an owner."""
        return self.num_pages - self.num_free

    def match_prefix(self, chain: TokenChain) -> list[int]:
        """Take a reference on each published page of the chain's longest known prefix, and return them in order.

        At least the last token is never matched, so that there is something left to compute.
        """
        if not chain.keys:
            return []
        matched: list[int] = []
        for key in chain.keys[: (len(chain.tokens) - 1) // self._page_size]:
            page = self._page_of.get(key)
            if page is None:
                break
            if self._num_refs[page] == 0:
                del self._evictable[page]
            self._num_refs[page] += 1
            matched.append(page)
        return matched

    def num_shared(self, pages: Sequence[int]) -> int:
        """Return how many of these pages, all taken, have other owners too, and so stay when one lets go of them."""
        return sum(self._num_refs[page] > 1 for page in pages)

    def allocate(self, count: int) -> list[int] | None:
        """Return count private pages, or None, with nothing taken, when there are fewer than that."""
        assert count >= 0, f"cannot allocate {count} pages"
        if count > self.num_free:
            return None
        return [self._take() for _ in range(count)]

    def publish(self, chain: TokenChain, pages: Sequence[int], *, num_before: int, num_computed: int) -> None:
        """Make the pages that became full findable, now that tokens [num_before, num_computed) are computed.

        A page whose content is published already stays private to its owner.

        Args:
            chain: the tokens of the owner.
            pages: its block table: the page of each page_size tokens, from the start.
            num_before: tokens computed when this was called last.
            num_computed: tokens computed now.
        """
        for index in range(num_before // self._page_size, num_computed // self._page_size):
            page, key = pages[index], chain.keys[index]
            self.assert_writable(page)
            if key not in self._page_of:
                self._page_of[key] = page
                self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference on each page of a block table. Of its pages, the last ones are evicted first."""
        for page in reversed(pages):
            assert self._num_refs[page] > 0, f"page {page} was released more often than taken"
            self._num_refs[page] -= 1
            if self._num_refs[page] == 0:
                if self._key_of[page] is None:
                    self._free.append(page)
                else:
                    self._evictable[page] = None

    def assert_writable(self, page: int) -> None:
        """Assert that the page is private: exactly one owner, not published."""
        assert self._num_refs[page] == 1, f"page {page} would be written by one of {self._num_refs[page]} owners"
        assert self._key_of[page] is None, f"page {page} is published and would be written"

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._evictable.popitem(last=False)
            key = self._key_of[page]
            assert key is not None, f"page {page} was evictable without being published"
            del self._page_of[key]
            self._key_of[page] = None
        assert self._num_refs[page] == 0, f"page {page} was free with {self._num_refs[page]} references"
        self._num_refs[page] = 1
        return page
