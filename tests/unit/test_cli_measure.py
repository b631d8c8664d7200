"""`expertmesh doctor --measure`: what it writes, what `plan` makes of it, and how what goes wrong looks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertmesh.actors.cli import main, measure, plan_files
from expertmesh.actors.cli.measure_sizes import TINY, Sizes
from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.cluster.planner.fleet_cost import fleet_choices
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.kernels.cache_folder import cache_folder
from expertmesh.kernels.cpu.build import find_compiler
from tests.planner import CONFIG, small_shape
from tests.unit.test_cpu_times import times_of

Run = Callable[..., tuple[int, str, str]]
needs_kernels = pytest.mark.skipif(find_compiler() is None, reason="the CPU kernels cannot be built here")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own, with the compiled kernels of the user's."""
    own, shared = tmp_path / "cache" / "expertmesh", cache_folder()
    own.mkdir(parents=True)
    for kept in shared.iterdir() if shared.is_dir() else ():
        if kept.name != "planner":
            (own / kept.name).symlink_to(kept)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return own


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path) -> Run:
    """Run a command in this process; return exit code, stdout and stderr."""
    assert cache.is_dir()
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", *args])
        with pytest.raises(SystemExit) as caught:
            main.main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return call


def fake_run(monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]) -> None:
    """Have the process that measures answer this."""

    def answer(_sizes: Sizes, on_progress: Callable[[str], None]) -> dict[str, Any]:
        on_progress("cores")
        return result

    monkeypatch.setattr(measure, "_run", answer)


def measured_when_quiet(doing: list[str]) -> measure.Measured:
    """Measure for real; while others have the cores, times this short may contradict each other, and it says so."""
    for _ in range(10):
        doing.clear()
        try:
            return measure.measure(TINY, doing.append)
        except InputError as error:
            assert str(error).endswith("the machine is not quiet")  # noqa: PT017 - another may do
    pytest.fail("ten measurements contradicted themselves")


@needs_kernels
def test_tiny_layers_are_measured_and_planned_with(cache: Path, run: Run, tmp_path: Path) -> None:
    """All of it for real, with layers too small to say anything of the machine."""
    doing: list[str] = []
    found = measured_when_quiet(doing)
    assert len(doing) == 4
    assert {path.name for path in (cache / "planner").iterdir()} == {"this-machine.yaml", "calibration.json"}
    assert found.hardware.memory_bytes_per_s > 0
    assert found.hardware.flops("bf16") > 0
    assert found.hardware.tiers[0].bytes_per_s > 0
    assert all(value >= 0 for value in found.calibration.constants.values())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code, out, _ = run("plan", str(tmp_path / "config.json"), "--hardware", "this-machine", "--json")
    assert (code, json.loads(out)["plans"][0]["feasible"]) == (0, True)


def test_what_was_measured_is_read_again(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    fake_run(monkeypatch, {"times": times_of().model_dump(mode="json")})
    assert plan_files.this_machine() is None
    code, out, err = run("doctor", "--measure", "--json")
    assert (code, err.splitlines()[0]) == (0, "measuring cores")
    printed = json.loads(out)
    machine = plan_files.this_machine()
    assert machine is not None
    assert machine.fleet.step_s == printed["calibration"]["constants"]["fleet.step_s"] > 0
    assert machine.memory_bytes_per_s == printed["hardware"]["memory_bytes_per_s"] > 0
    steps = fleet_choices(small_shape(), machine, num_workers=1, num_shards=2, tokens=4)
    assert all(one.step_s > machine.fleet.step_s for one in steps.values())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert run("plan", str(tmp_path / "config.json"), "--hardware", "this-machine")[0] == 0


def test_a_table_and_where_it_is(monkeypatch: pytest.MonkeyPatch, run: Run, cache: Path) -> None:
    fake_run(monkeypatch, {"times": times_of().model_dump(mode="json")})
    code, out, _ = run("doctor", "--measure")
    assert code == 0
    assert "30.0 GB/s" in out
    assert "10.0 us, 5.00 GB/s" in out
    assert str(cache / "planner" / "this-machine.yaml") in out


@pytest.mark.parametrize(("others_s", "is_told"), [(0.0, False), (1e9, True)])
def test_a_machine_that_is_not_quiet_is_told_of(
    others_s: float, is_told: bool, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    fake_run(monkeypatch, {"times": times_of().model_dump(mode="json")})
    clock = iter([0.0, others_s])
    monkeypatch.setattr(measure, "_others_cpu_s", lambda: next(clock))
    code, _, err = run("doctor", "--measure")
    assert (code, "measure again when the machine is quiet" in " ".join(err.split())) == (0, is_told)


def test_gpus_are_written_too(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """As torch would have measured two of them: this test has none."""
    link = {"name": "between GPUs", "domain_size": 2, "bytes_per_s": 3e11, "latency_s": 1e-5, "source": "made up"}
    gpus = {"name": "this-machine", "num_gpus": 2, "memory_bytes": 8e10, "memory_bytes_per_s": 3e12, "tiers": [link]}
    fake_run(monkeypatch, {"hardware": {**gpus, "flop_per_s": {"bf16": 7e14}}})
    assert run("doctor", "--measure")[0] == 0
    machine = plan_files.this_machine()
    assert isinstance(machine, Hardware)
    assert (machine.num_gpus, machine.fleet.shares_cores) == (2, False)


def test_a_cache_that_cannot_be_written_is_one_line_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path
) -> None:
    def never(*_: object) -> dict[str, Any]:
        raise AssertionError("it was timed first")

    monkeypatch.setattr(measure, "_run", never)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, out, err = run("doctor", "--measure")
    assert (code, out) == (2, "")
    path = tmp_path / "file" / "expertmesh" / "planner" / "this-machine.yaml"
    assert err == f"error: --measure: {path} cannot be written: Not a directory\n"


def test_no_room_is_one_line(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def full(path: Path, _write: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    fake_run(monkeypatch, {"times": times_of().model_dump(mode="json")})
    monkeypatch.setattr(measure, "keep", full)
    code, _, err = run("doctor", "--measure")
    assert code == 2
    assert err.splitlines()[-1].endswith("this-machine.yaml cannot be written: No space left on device")


def test_a_process_that_ends_says_why(cache: Path) -> None:
    """Sizes that no kernel takes: the last line of what the process complained of is in the error."""
    assert cache.is_dir()
    wrong = Sizes(hidden_size=33, num_layers=1, num_dense_layers=1, rounds=1)
    with pytest.raises(UnavailableError, match=r"--measure: its process ended with -?\d+"):
        measure.measure(wrong, lambda _: None)
