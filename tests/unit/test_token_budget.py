"""Whoever holds the most goes first, and nobody while there is room."""

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.requests import TokenEvent, TokenLogprob
from expertmesh.cluster.token_budget import TokenBudget, num_tokens


def test_the_largest_goes_and_the_others_stay() -> None:
    budget, gone = TokenBudget(10), list[str]()
    small = budget.open(lambda: gone.append("small"))
    large = budget.open(lambda: gone.append("large"))
    small.add(3)
    large.add(7)
    assert (gone, budget.num_held) == ([], 10)
    small.add(1)
    assert (gone, budget.num_held) == (["large"], 4)
    large.add(100)
    large.take(50)
    large.close()
    assert (gone, budget.num_held) == (["large"], 4)


def test_what_was_read_makes_room() -> None:
    budget, gone = TokenBudget(10), list[str]()
    account = budget.open(lambda: gone.append("it"))
    for _ in range(5):
        account.add(10)
        account.take(10)
    assert (gone, budget.num_held) == ([], 0)
    account.add(11)
    assert gone == ["it"]


def test_one_that_closes_others_as_it_goes_is_no_trouble() -> None:
    budget = TokenBudget(10)
    other = budget.open(lambda: None)
    account = budget.open(other.close)
    other.add(5)
    account.add(6)
    assert budget.num_held == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 30)), max_size=60))
def test_no_more_is_held_than_allowed_and_sums_agree(changes: list[tuple[int, int]]) -> None:
    budget, gone = TokenBudget(40), set[int]()
    accounts = [budget.open(lambda index=index: gone.add(index)) for index in range(5)]  # type: ignore[misc]
    for index, change in changes:
        held = {i: accounts[i].num_held for i in range(5) if i not in gone}
        account, before = accounts[index], set(gone)
        if change >= 0:
            account.add(change)
        else:
            account.take(min(-change, account.num_held))
        for lost in gone - before:
            assert held[lost] + (change if lost == index else 0) >= max(
                accounts[i].num_held for i in range(5) if i not in gone or i == lost
            )
        assert budget.num_held == sum(accounts[i].num_held for i in range(5) if i not in gone) <= 40


def test_alternatives_count() -> None:
    top = tuple(TokenLogprob(token_id=other, logprob=-1.0) for other in range(3))
    events = [TokenEvent(sequence_id="a", index=0, token_id=1), TokenEvent(sequence_id="a", index=1, token_id=2)]
    assert num_tokens(events) == 2
    assert num_tokens([TokenEvent(sequence_id="a", index=0, token_id=1, logprob=-1.0, top_logprobs=top)]) == 4
