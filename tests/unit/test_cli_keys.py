"""`expertmesh keys`: what is printed once, what is kept, and what is refused."""

import json
import multiprocessing
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expertmesh.actors.cli import main
from expertmesh.actors.gateway.key_book import KeyBook, read_keys
from expertmesh.cluster.api_keys import MAX_KEYS, format_keys, hash_secret
from tests.unit.api_keys import key

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `keys ARGS` beside a file keys.toml; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", "keys", *args])
        with pytest.raises(SystemExit) as caught:
            main.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def test_the_secret_is_printed_once_and_only_its_hash_is_kept(run: Run) -> None:
    code, out, err = run("create", "alice", "--role", "admin")
    secret, path = out.strip(), Path("keys.toml")
    assert code == 0
    assert re.fullmatch(r"em-[A-Za-z0-9_-]{43}", secret)
    assert "shown this once" in err
    assert secret not in err + path.read_text()
    assert read_keys(path)[0].sha256 == hash_secret(secret)
    assert secret not in f"{run('list')}{run('list', '--json')}"
    found = KeyBook(path).find(secret)
    assert found is not None
    assert (found.name, found.role) == ("alice", "admin")


def test_two_secrets_differ(run: Run) -> None:
    assert run("create", "a")[1] != run("create", "b")[1]


def test_all_that_can_be_said_of_a_key(run: Run) -> None:
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "9000", "--max-concurrent", "4")
    made = json.loads(run("create", "a", *limits, "--weight", "2.5", "--expires", "2030-01-31", "--json")[1])
    (shown,) = json.loads(run("list", "--json")[1])["keys"]
    assert shown == {
        "name": "a",
        "role": "inference",
        "requests_per_minute": 60,
        "tokens_per_minute": 9000,
        "max_concurrent": 4,
        "weight": 2.5,
        "expires": "2030-01-31T00:00:00Z",
    }
    assert made == {**shown, "secret": made["secret"]}
    assert "9000" in run("list")[1]


def test_the_file_is_the_owners_alone_and_replaced_as_a_whole(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(format_keys([key("old")]))
    path.chmod(0o644)
    before = path.stat().st_ino
    assert run("create", "new")[0] == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_ino != before
    assert [one.name for one in read_keys(path)] == ["old", "new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(run: Run, tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text("")
    (tmp_path / "keys.toml").symlink_to(real)
    assert run("create", "a")[0] == 0
    assert (tmp_path / "keys.toml").is_symlink()
    assert [one.name for one in read_keys(real)] == ["a"]


def test_revoke(run: Run) -> None:
    run("create", "a")
    run("create", "b")
    assert run("revoke", "a") == (0, "revoked a\n", "")
    assert json.loads(run("revoke", "b", "--json")[1]) == {"revoked": "b"}
    assert read_keys(Path("keys.toml")) == ()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("create", "old"), "keys.toml has a key old already"),
        (("create", "a b"), "NAME 'a b': String should match pattern"),
        (("create", "-"), "NAME '-': String should match pattern"),
        (("create", "a", "--weight", "0"), "--weight 0.0: Input should be greater"),
        (("create", "a", "--max-concurrent", "0"), "--max-concurrent 0: Input should be greater"),
        (("create", "a", "--role", "root"), "'root' is not one of 'inference', 'admin'"),
        (("create", "a", "--expires", "soon"), "--expires 'soon' is no date such as 2030-01-31"),
        (("create", "a", "--expires", "2030-01-31T12:00:00"), "--expires '2030-01-31T12:00:00' has no time zone"),
        (("create", "a", "--file", "none/keys.toml"), "none: No such file or directory"),
        (("create", "a", "--file", "broken.toml"), "keys file broken.toml: it is no TOML"),
        (("revoke", "a"), "keys.toml has no key 'a'; it has old"),
        (("revoke", "a", "--file", "none.toml"), "there is no file none.toml"),
        (("list", "--file", "none.toml"), "keys file none.toml: No such file"),
    ],
)
def test_what_is_wrong_is_one_line_and_changes_nothing(args: tuple[str, ...], message: str, run: Run) -> None:
    Path("keys.toml").write_text(format_keys([key("old")]))
    Path("broken.toml").write_text("[[key]")
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert Path("keys.toml").read_text() == format_keys([key("old")])


def test_a_full_file_takes_no_more(run: Run) -> None:
    Path("keys.toml").write_text(format_keys([key(f"k{number}") for number in range(MAX_KEYS)]))
    code, _, err = run("create", "a")
    assert (code, err) == (2, f"error: keys.toml has {MAX_KEYS} keys; at most {MAX_KEYS} are allowed\n")


def _create(name: str) -> None:
    sys.argv = ["expertmesh", "keys", "create", name]
    try:
        main.main()
    except SystemExit as ended:
        assert not ended.code  # noqa: PT017 - in a process of its own


def test_keys_that_are_made_at_once_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"k{number}" for number in range(4)]
    processes = [multiprocessing.get_context("spawn").Process(target=_create, args=(name,)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(one.name for one in read_keys(tmp_path / "keys.toml")) == names
