"""Lines of a log: their form, that nothing in a field ends one, and that code, table and page agree."""

import ast
import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from string import Formatter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.actors.log_events import BY_NAME, EVENTS
from expertmesh.actors.logs import RESERVED, EventLog
from tests.log_lines import logged

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "logs.md"
EVIL = 'x" } \n{"event": "forged"}\r\x1b[31m\u2028\x00 y=1'
log = EventLog("expertmesh.tests")


def test_a_line_is_a_json_object_with_the_same_first_fields() -> None:
    with logged() as lines:
        log.tell("link_made", shard="shard-1", kind="shared", generation=3, epoch=None)
    assert lines.text.count("\n") == 2, "that the process began, and the event"
    line = lines.records[1]
    assert list(line) == [*RESERVED[:7], "shard", "kind", "generation"], "what is None is left out"
    assert (line["event"], line["level"], line["process"], line["node"]) == ("link_made", "info", "worker-0", "node-1")
    assert line["message"] == "linked to shard-1: shared, generation 3"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["time"])
    assert datetime.fromisoformat(line["time"]).timestamp() == pytest.approx(datetime.now().timestamp(), abs=60)


def test_text_says_the_same() -> None:
    with logged(log_format="text") as lines:
        log.tell("step_retried", step=7, layer=2, shards=["a", "b c"], request_ids=["r-1"])
        log.tell("worker_call_failed", _raised("no\nway"), worker="w", call="poll")
    _, retried, failed, *trace = lines.text.splitlines()
    pattern = (
        r"\S+Z warning worker-0\(\d+@node-1\) step_retried: step 7, layer 2: asked again for what a, b c did not do"
        r' step=7 layer=2 shards=a,"b c" request_ids=r-1'
    )
    assert re.fullmatch(pattern, retried), retried
    assert failed.endswith("worker=w call=poll")
    assert trace[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in trace), "what an error says cannot look like an event"


@pytest.mark.parametrize("form", ["json", "text"])
def test_nothing_in_a_field_ends_a_line(form: str) -> None:
    with logged(log_format=form) as lines:
        log.tell("request_rejected", request_id=EVIL, outcome="INVALID_ARGUMENT", reason=EVIL)
    assert lines.text.count("\n") == 2
    assert lines.text.removesuffix("\n").replace("\n", "").isascii()
    assert all(c.isprintable() for c in lines.text.replace("\n", ""))
    if form == "json":
        assert lines.records[1]["request_id"] == EVIL


@settings(deadline=None)
@given(st.text(), st.lists(st.text(), max_size=3))
def test_any_text_comes_back_from_its_line(reason: str, request_ids: list[str]) -> None:
    with logged() as lines:
        log.tell("step_failed", step=1, num_sequences=1, duration_s=0.5, reason=reason, request_ids=request_ids)
    assert lines.records[1]["reason"] == reason
    assert lines.records[1]["request_ids"] == request_ids


def test_long_texts_are_cut() -> None:
    with logged() as lines:
        log.tell("request_rejected", request_id="r", outcome="400", reason="a" * 50_000)
    assert len(lines.text) < 6000
    assert lines.records[1]["reason"].endswith("a... (50000 characters)")


def test_numbers_stay_json() -> None:
    with logged() as lines:
        log.tell("step_slow", step=1, duration_s=float("nan"))
        log.tell("step_slow", step=2, duration_s=1 / 3)
    _, odd, even = [json.loads(line, parse_constant=pytest.fail) for line in lines.text.splitlines()]
    assert (odd["duration_s"], even["duration_s"]) == ("nan", 0.333333)


def test_a_traceback_is_in_the_line() -> None:
    with logged() as lines:
        log.tell("engine_stopped", _raised("a cause"))
    (line,) = lines.of("engine_stopped")
    assert line["level"] == "error"
    assert "Traceback" in line["exception"]
    assert "a cause" in line["exception"]


def test_the_level_decides() -> None:
    with logged("info") as lines:
        assert not log.is_told("step_done")
        log.tell("step_done", step=1, num_tokens=1, num_sequences=1, duration_s=0.1)
        log.tell("readiness_changed", ready=True)
    assert [line["event"] for line in lines.records] == ["process_started", "readiness_changed"]
    with logged("error") as lines:
        log.tell("readiness_changed", ready=True)
    assert lines.text == ""


def test_what_others_log_comes_in_the_same_form() -> None:
    with logged() as lines:
        logging.getLogger("expertmesh.models.runners").info("%d layers run compiled attention", 4)
        logging.getLogger("somebody.else").warning("beware\nof this")
        logging.getLogger("somebody.else").info("chatter")
    _, ours, theirs = lines.records
    assert (ours["event"], ours["logger"]) == ("log", "expertmesh.models.runners")
    assert ours["message"] == "4 layers run compiled attention"
    assert theirs["message"] == "beware\nof this"


def test_a_process_that_starts_its_log_again_has_each_line_once() -> None:
    with logged() as first, logged() as second:
        log.tell("readiness_changed", ready=True)
    assert not first.of("readiness_changed")
    assert len(second.of("readiness_changed")) == 1


def test_the_docs_show_the_table() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert rows == [f"| `{event.name}` | {event.level_name} | {event.message} |" for event in EVENTS]


def test_names_are_unique_and_snake_case() -> None:
    assert len(BY_NAME) == len(EVENTS)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", event.name) for event in EVENTS)


def test_every_event_is_told_with_the_fields_that_its_message_names() -> None:
    told = set()
    for path, call in _calls():
        names, fields = _names_of(call.args[0]), {k.arg for k in call.keywords}
        for name in names:
            place = f"{path.relative_to(ROOT)}:{call.lineno}: {name}"
            assert name in BY_NAME, place
            wanted = {field for _, field, _, _ in Formatter().parse(BY_NAME[name].message) if field}
            # A field of None is one that is given by name, from a mapping.
            assert wanted <= fields or None in fields, f"{place} lacks {wanted - fields}"
            assert not fields & {*RESERVED}, f"{place} has fields that every line has"
            told.add(name)
    assert told == set(BY_NAME)


def test_no_field_is_of_a_prompt_or_an_output() -> None:
    names = {keyword.arg or "" for _, call in _calls() for keyword in call.keywords}
    assert len(names) > 50
    assert not {name for name in names if re.search(r"text|prompt(?!_tokens)|token_ids|secret|key$", name)} - {"key"}
    assert {name for name in names if "prompt" in name} == {"prompt_tokens"}


def _calls() -> Iterator[tuple[Path, ast.Call]]:
    """Yield each call of EventLog.tell."""
    for path in sorted((ROOT / "actors").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "tell":
                yield path, node


def _names_of(argument: ast.expr) -> list[str]:
    """Return the event names that an argument may be: one, one of two, or those of the variable that holds it."""
    if isinstance(argument, ast.Constant):
        return [str(argument.value)]
    if isinstance(argument, ast.IfExp):
        return [*_names_of(argument.body), *_names_of(argument.orelse)]
    assert isinstance(argument, ast.Name), ast.dump(argument)
    return {"event": ["step_slow", "step_done"]}[argument.id]


def _raised(text: str) -> ValueError:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def test_json_lines_are_those_of_a_log_collector() -> None:
    """One object a line, each by itself: no array, no line between them."""
    with logged() as lines:
        for step in range(3):
            log.tell("step_slow", step=step, duration_s=1.0)
    assert [json.loads(line)["step"] for line in lines.text.splitlines()[1:]] == [0, 1, 2]
