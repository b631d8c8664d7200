"""`expertmesh trace` against a server that counts a little more at each look, and on files that are no traces."""

import json
from pathlib import Path

import pytest

from expertmesh.cluster.traces import TraceReader
from tests.unit.test_cli import Run, run, tokenizer, url

__all__ = ["run", "tokenizer", "url"]  # fixtures

SHAPE = ("--layers", "3", "--experts", "16", "--top-k", "2", "--hidden-size", "64")


def test_a_trace_is_recorded_from_a_running_server(run: Run, url: str, tmp_path: Path) -> None:
    file = tmp_path / "a.trace"
    code, out, err = run("trace", "record", str(file), "--url", url, "--seconds", "0.5", "--period-s", "0.1", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    reader = TraceReader(file.read_bytes())
    assert (reader.header.model, reader.header.layers, reader.header.hidden_size) == ("fake", (0, 1), 8)
    steps = list(reader.steps())
    assert 1 <= len(steps) == told["num_steps"] <= 5  # fewer on a busy machine
    for step in steps:
        assert (step.prefill_tokens, step.decode_tokens) == (1, 2)
        assert step.load_LE.tolist() == [[3, 2, 1, 0]] * 2
    assert 0.1 <= told["duration_s"] == steps[-1].time_s
    tokens = [len(steps) * count for count in (3, 2, 1, 0)]
    assert told["loads"] == [{"layer": layer, "tokens": tokens} for layer in (0, 1)]


def test_a_trace_is_made_up_and_shown(run: Run, tmp_path: Path) -> None:
    file, second = tmp_path / "a.trace", tmp_path / "b.trace"
    code, out, _ = run("trace", "make", str(file), *SHAPE, "--zipf", "1.2", "--steps", "30", "--model", "mine")
    assert code == 0
    assert "mine, 3 MoE layers of 16 experts, top 2, hidden size 64" in " ".join(out.split())
    assert "30 intervals in 30.0 s: 1920 tokens, 0 of prompts and 1920 generated, 64.0 a second" in " ".join(
        out.split()
    )
    code, out, _ = run("trace", "make", str(second), "--like", str(file), "--zipf", "0", "--json")
    even = json.loads(out)
    code, out, _ = run("trace", "show", str(file), "--json")
    skewed = json.loads(out)
    assert (skewed["model"], skewed["top_k"], skewed["bytes"]) == ("mine", 2, file.stat().st_size)
    assert even["model"] == "mine"
    assert skewed["imbalance"] > 3 > 1.2 > even["imbalance"]


def test_topics_show_as_more_imbalance_within_intervals(run: Run, tmp_path: Path) -> None:
    options = (*SHAPE, "--zipf", "1.2", "--steps", "40", "--topic-steps", "4", "--json")
    told = json.loads(run("trace", "make", str(tmp_path / "a"), *options)[1])
    assert told["interval_imbalance"] > 1.5 * told["imbalance"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("make", "a", "--layers", "3", "--experts", "4"), 2, "is needed where there is no --like FILE"),
        (("make", "a", *SHAPE, "--layers", "0"), 2, "--layers is 0; it must be at least 1"),
        (("make", "a", *SHAPE, "--top-k", "17"), 2, "top_k=17: it must be 1 to num_experts=16"),
        (("make", "a", *SHAPE, "--zipf", "-1"), 2, "skew=-1.0"),
        (("make", "a", *SHAPE, "--like", "damaged"), 2, "beside --like damaged, which says it"),
        (("make", "a", "--like", "damaged"), 2, "damaged: not a trace"),
        (("make", "no/where", *SHAPE), 2, "no/where: No such file or directory"),
        (("show", "nowhere"), 2, "nowhere: No such file or directory"),
        (("show", "damaged"), 2, "damaged: not a trace: 7 bytes that begin with b'some'"),
        (("show", "empty"), 2, "empty: not a trace: 0 bytes"),
        (("show", "short"), 2, "short: a trace that was cut short"),
        (("record", "a", "--seconds", "0"), 2, "--seconds 0.0 and --period-s 1.0"),
        (("record", "a", "--seconds", "inf"), 2, "--seconds inf"),
        (("record", "a", "--url", "localhost:1"), 1, "no answer from localhost:1"),
        (("replay", "a"), 2, "No such command 'replay'"),
    ],
)
def test_what_cannot_be_is_one_line(
    args: tuple[str, ...], code: int, message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged").write_text("some...")
    Path("empty").touch()
    assert run("trace", "make", "whole", *SHAPE)[0] == 0
    Path("short").write_bytes(Path("whole").read_bytes()[:-1])
    got, _, err = run("trace", *args)
    assert got == code
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert not Path("a").exists()
