import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.stop_strings import StopMatcher, _borders

# Two letters and short strings: most examples contain whole and broken matches.
few_letters = st.text(alphabet="ab", min_size=5, max_size=30)
stop_strings = st.lists(st.text(alphabet="ab", min_size=2, max_size=6), max_size=3).map(tuple)


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The definition, on the whole text: every prefix in turn, until one ends with a stop string."""
    for end in range(1, len(text) + 1):
        completed = [string for string in stop if text[:end].endswith(string)]
        if completed:
            return text[: end - max(map(len, completed))], True
    return text, False


def in_pieces(text: str, cuts: list[int]) -> list[str]:
    ends = [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@settings(max_examples=1000)
@given(few_letters, stop_strings, st.lists(st.integers(0, 1000), max_size=12))
def test_any_pieces_are_cut_like_the_whole_text(text: str, stop: tuple[str, ...], cuts: list[int]) -> None:
    matcher = StopMatcher(stop)
    passed, matched = "", False
    expected = cut_at_stop(text, stop)
    for piece in in_pieces(text, cuts):
        safe, matched = matcher.push(piece)
        passed += safe
        assert expected[0].startswith(passed)
    assert (passed + matcher.flush(), matched) == expected


@given(few_letters, stop_strings)
def test_no_more_is_held_than_must_be(text: str, stop: tuple[str, ...]) -> None:
    safe, matched = StopMatcher(stop).push(text)
    if not matched:
        held = text[len(safe) :]
        endings = [text[start:] for start in range(len(text))]
        assert held == next((e for e in endings if any(s.startswith(e) for s in stop)), "")


@given(st.text(alphabet="ab", min_size=1, max_size=20))
def test_borders(string: str) -> None:
    def border(prefix: str) -> int:
        return max((n for n in range(1, len(prefix)) if prefix.endswith(prefix[:n])), default=0)

    assert _borders(string) == [border(string[:end]) for end in range(len(string) + 1)]


def test_a_match_over_three_pieces() -> None:
    matcher = StopMatcher(("\n\nUser:",))
    assert matcher.push("Yes.\n") == ("Yes.", False)
    assert matcher.push("\nUs") == ("", False)
    assert matcher.push("er: and") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_a_broken_match_gives_the_text_back() -> None:
    matcher = StopMatcher(("abcd", "bce"))
    assert matcher.push("xabc") == ("x", False)
    assert matcher.push("e") == ("a", True)
    matcher = StopMatcher(("abcd",))
    assert matcher.push("abc") == ("", False)
    assert matcher.push("abc!") == ("abcabc!", False)
    assert matcher.push("ab") == ("", False)
    assert matcher.flush() == "ab"
    assert matcher.push("cd") == ("cd", False)


def test_the_first_completed_wins_and_then_the_longest() -> None:
    assert StopMatcher(("abcde", "c")).push("xabcde") == ("xab", True)
    assert StopMatcher(("c", "abc", "bc")).push("xabc") == ("x", True)


def test_a_long_repetitive_stop_string() -> None:
    stop = "a" * 20_000 + "b"
    matcher = StopMatcher((stop,))
    passed = "".join(matcher.push("a" * 1000)[0] for _ in range(61))
    assert passed == "a" * 41_000
    assert matcher.push("b") == ("", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match=r"must not be empty, got \['x', ''\]"):
        StopMatcher(("x", ""))
