from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.kv_pages import PagePool, TokenChain

SIZE = 4


def chain_of(*token_ids: int) -> TokenChain:
    return TokenChain(token_ids, page_size=SIZE)


def computed(pool: PagePool, chain: TokenChain) -> list[int]:
    """The block table of a chain after all of its tokens were computed in fresh pages and published."""
    pages = pool.allocate(-(-len(chain.tokens) // SIZE))
    assert pages is not None
    pool.publish(chain, pages, num_before=0, num_computed=len(chain.tokens))
    return pages


def test_keys_depend_on_all_tokens_before_and_on_how_they_came_not_at_all() -> None:
    grown = chain_of()
    for token in range(9):
        grown.append(token)
    assert grown.keys == chain_of(*range(9)).keys
    assert len(grown.keys) == 2
    assert chain_of(9, 1, 2, 3, 4, 5, 6, 7).keys[1] != grown.keys[1]
    assert chain_of(*[0] * 8).keys[0] != chain_of(*[0] * 8).keys[1]
    assert TokenChain(range(9), page_size=0).keys == []


def test_a_published_prefix_is_shared_but_never_a_whole_prompt() -> None:
    pool = PagePool(8, SIZE)
    pages = computed(pool, chain_of(*range(8)))
    assert pool.match_prefix(chain_of(*range(8))) == pages[:1]
    assert pool.match_prefix(chain_of(*range(9))) == pages
    assert pool.match_prefix(chain_of(0, 1, 2, 3, 9, 9, 9, 9, 9)) == pages[:1]
    assert pool.match_prefix(chain_of(9, *range(1, 9))) == []
    assert pool.num_used == 2
    with pytest.raises(AssertionError, match="would be written by one of 4 owners"):
        pool.assert_writable(pages[0])


def test_a_page_is_found_only_after_all_its_tokens_were_computed() -> None:
    pool, chain = PagePool(8, SIZE), chain_of(*range(8))
    pages = pool.allocate(2)
    assert pages is not None
    pool.publish(chain, pages, num_before=0, num_computed=3)
    assert pool.match_prefix(chain) == []
    pool.publish(chain, pages, num_before=3, num_computed=4)
    assert pool.match_prefix(chain) == pages[:1]


def test_the_least_recently_used_prefix_is_evicted_first_and_its_end_before_its_start() -> None:
    pool = PagePool(4, SIZE)
    old, new = chain_of(*range(9)), chain_of(*range(10, 19))
    for chain in (old, new):
        pages = pool.allocate(2)
        assert pages is not None
        pool.publish(chain, pages, num_before=0, num_computed=8)
        pool.release(pages)
    assert (pool.num_free, pool.num_used) == (4, 0)
    pool.release(pool.match_prefix(old))  # now the other is the older
    assert pool.allocate(1) is not None
    assert len(pool.match_prefix(new)) == 1
    assert len(pool.match_prefix(old)) == 2
    assert pool.allocate(1) is None


def test_an_allocation_is_all_or_nothing() -> None:
    pool = PagePool(3, SIZE)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert sorted(pool.allocate(3) or ()) == [0, 1, 2]
    assert pool.allocate(0) == []
    assert PagePool(0, 0).allocate(1) is None


def test_releasing_twice_is_caught() -> None:
    pool = PagePool(2, SIZE)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages)


@pytest.mark.parametrize(("num_pages", "page_size"), [(-1, 4), (4, 0), (4, -1)])
def test_sizes_that_make_no_pool_are_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(InputError, match=f"num_pages={num_pages}"):
        PagePool(num_pages, page_size)


class PoolMachine(RuleBasedStateMachine):
    """Owners come, compute, and go; a page's true content is written beside the pool and compared."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(7, 2)
        self.owners: list[tuple[TokenChain, list[int]]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=8), num_computed=st.integers(0, 8))
    def start(self, token_ids: list[int], num_computed: int) -> None:
        chain = TokenChain(token_ids, page_size=2)
        matched = self.pool.match_prefix(chain)
        assert len(matched) * 2 < len(token_ids)
        for index, page in enumerate(matched):
            assert self.content[page] == tuple(token_ids[: (index + 1) * 2])
        new = self.pool.allocate(-(-len(token_ids) // 2) - len(matched))
        if new is None:
            self.pool.release(matched)
            return
        pages, stop = matched + new, max(len(matched) * 2, min(num_computed, len(token_ids)))
        for index in range(len(matched), len(pages)):
            self.pool.assert_writable(pages[index])
            self.content[pages[index]] = tuple(token_ids[: (index + 1) * 2])
        self.pool.publish(chain, pages, num_before=len(matched) * 2, num_computed=stop)
        self.owners.append((chain, pages))

    @rule(which=st.integers(0, 6))
    def stop(self, which: int) -> None:
        if which < len(self.owners):
            _, pages = self.owners.pop(which)
            self.pool.release(pages)

    @invariant()
    def counts_add_up_and_owned_pages_keep_their_content(self) -> None:
        num_owners = Counter(page for _, pages in self.owners for page in pages)
        assert self.pool.num_used == len(num_owners)
        assert self.pool.num_used + self.pool.num_free == self.pool.num_pages
        for chain, pages in self.owners:
            for index, page in enumerate(pages):
                assert self.content[page] == tuple(chain.tokens[: (index + 1) * 2])


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestPoolMachine = PoolMachine.TestCase
