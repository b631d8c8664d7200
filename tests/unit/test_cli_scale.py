"""`scale`, `drain`, `ops`, `rebalance` and `placement` against a real server over fake operations."""

import json
from pathlib import Path

import pytest

from tests.unit.test_cli import Run, run, tokenizer, url

__all__ = ["run", "tokenizer", "url"]  # fixtures


def test_an_operation_is_begun_and_shown(run: Run, url: str) -> None:
    code, out, _ = run("scale", "--shards", "3", "--url", url)
    assert code == 0
    assert "scale to 3 shards and None workers: PREPARE starting shard-2" in out


def test_wait_follows_it_to_its_end(run: Run, url: str) -> None:
    code, out, _ = run("drain", "shard-1", "--wait", "--json", "--url", url)
    assert code == 0
    operation = json.loads(out)
    assert (operation["request"], operation["phase"], operation["ended_s"]) == ("drain shard-1", "DONE", 12.5)
    assert run("ops", operation["id"], "--json", "--url", url)[1].strip() == out.strip()
    code, out, _ = run("ops", "--url", url)
    assert code == 0
    assert "drain shard-1" in out
    assert "DONE" in out


def test_one_that_was_rolled_back_is_an_error(run: Run, url: str) -> None:
    code, _, err = run("drain", "shard-9", "--wait", "--url", url)
    assert code == 1
    assert "was rolled back: it died" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["scale", "--shards", "0"], 2, "--shards is 0; it must be at least 1"),
        (["scale", "--shards", "99"], 1, "op-0 is under way: drain shard-1"),
        (["drain", "shard-7"], 2, "there is no 'shard-7'"),
    ],
)
def test_what_cannot_be_begun_is_one_clear_line(
    run: Run, url: str, arguments: list[str], code: int, message: str
) -> None:
    got, out, err = run(*arguments, "--url", url)
    assert (got, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_rebalance_shows_its_plan_and_does_it(run: Run, url: str) -> None:
    code, out, _ = run("rebalance", "--dry-run", "--url", url)
    assert code == 0
    assert "1 moves, 4.0 KiB" in out
    assert "balancedness 0.500 now, 0.750 after" in out
    assert "gain 10.0 s, cost 0.50 s: saves a third" in out
    plan = json.loads(run("rebalance", "--dry-run", "--json", "--url", url)[1])
    assert plan["operation"] is None
    assert plan["moves"] == [{"layer": 1, "expert": 5, "source": "shard-0", "target": "shard-1"}]
    code, out, _ = run("rebalance", "--wait", "--json", "--url", url)
    assert (code, json.loads(out)["phase"]) == (0, "DONE")


def test_a_placement_is_saved_and_loaded(run: Run, url: str, tmp_path: Path) -> None:
    file = tmp_path / "placement"
    assert run("placement", "save", str(file), "--url", url)[0] == 0
    assert file.read_bytes() == b"a placement"
    code, out, _ = run("placement", "load", str(file), "--wait", "--url", url)
    assert code == 0
    assert "load placement: DONE" in out
    file.write_bytes(b"something else")
    for arguments, message in (
        (("load", str(file)), "not a placement record"),
        (("load", str(tmp_path / "absent")), "No such file"),
        (("save", str(tmp_path / "absent" / "file")), "No such file"),
        (("lose", str(file)), "it is save or load"),
    ):
        code, out, err = run("placement", *arguments, "--url", url)
        assert (code, out) == (2, "")
        assert message in err
