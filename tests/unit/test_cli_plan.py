"""`expertmesh plan`: what it prints and writes, and how wrong input looks."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from expertmesh.actors.cli import main, plan_files
from tests.planner import CONFIG, machine

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in this process, with a cache of its own; return exit code, stdout and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", "plan", *args])
        with pytest.raises(SystemExit) as caught:
            main.main()
        captured = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call


def write_config(tmp_path: Path, **changes: object) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def write_hardware(path: Path, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**json.loads(machine().model_dump_json()), **changes}))
    return path


def test_a_card_on_a_shipped_machine(run: Run) -> None:
    code, out, err = run(
        "example-478b", "--hardware", "workstation-blackwell-x4", "--dtype", "nvfp4", "--tokens-per-step", "1"
    )
    assert (code, err) == (0, "")
    assert "example-478b: 472.1 B parameters" in out
    assert "recommended: attention TP=4 x DP=1, experts EP=1 x TP=4: " in out
    assert "does not fit by" in out
    assert "milliseconds of its step: " in out


def test_a_narrow_terminal_has_fewer_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = run("mixtral-8x7b")[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    narrow = run("mixtral-8x7b")[1]
    assert "all-reduce MB" in wide
    assert "all-reduce MB" not in narrow
    assert "columns more in" in narrow


def test_all_prints_every_plan(run: Run) -> None:
    options = ("mixtral-8x7b", "--hardware", "hgx-h100")
    short, long = run(*options)[1], run(*options, "--all")[1]
    assert "slower plans are not shown; --all prints them" in short
    assert "not shown" not in long
    refused = sum(row["why_not"] is not None for row in json.loads(run(*options, "--json")[1])["plans"])
    assert long.count("cannot run: ") == refused


def test_json_of_a_directory_and_a_yaml_file(run: Run, tmp_path: Path) -> None:
    hardware = write_hardware(tmp_path / "mine.yaml")
    code, out, _ = run(str(write_config(tmp_path)), "--hardware", str(hardware), "--json", "--skew", "0")
    report = json.loads(out)
    assert code == 0
    assert (report["model"], report["hardware"], report["num_gpus"]) == ("model", "made up", 4)
    assert report["plans"][report["recommended"]]["verdict"] == "recommended"
    file = json.loads(
        run(str(tmp_path / "model" / "config.json"), "--hardware", str(hardware), "--json", "--skew", "0")[1]
    )
    assert file["plans"] == report["plans"]


def test_gpus_tokens_and_replicas_are_as_asked(run: Run) -> None:
    code, out, _ = run("deepseek-v3", "--gpus", "16", "--dtype", "fp8", "--replicas", "2", "--json")
    plans = json.loads(out)["plans"]
    assert code == 0
    assert max(row["num_gpus"] for row in plans) == 16
    assert {row["replicas"] for row in plans if row["ep"] > 1} == {2}


def test_nothing_that_fits_is_exit_code_1(run: Run) -> None:
    code, out, _ = run("deepseek-v3", "--hardware", "h200-x1", "--dtype", "fp8")
    assert code == 1
    assert "nothing recommended: no plan can run: the nearest does not fit by" in out


def test_a_calibration_changes_the_figures(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"source": "measured here", "constants": {"memory_bytes_per_s": 1e12}}))
    options = ("mixtral-8x7b", "--json")
    shipped, measured = (json.loads(run(*options, *more)[1]) for more in ((), ("--calibration", str(file))))
    assert measured["plans"][0]["step_s"] > shipped["plans"][0]["step_s"]


def test_this_machine_is_what_was_measured(run: Run, tmp_path: Path) -> None:
    code, _, err = run("mixtral-8x7b", "--hardware", "this-machine")
    assert (code, err) == (
        2,
        "error: --hardware this-machine: not measured yet; run `expertmesh doctor --measure` first\n",
    )
    write_hardware(plan_files.measured_hardware())
    model = str(write_config(tmp_path))
    before = json.loads(run(model, "--hardware", "this-machine", "--json")[1])
    content = {"source": "measured", "constants": {"memory_bytes_per_s": 1e9}}
    plan_files.measured_calibration().write_text(json.dumps(content))
    after = json.loads(run(model, "--hardware", "this-machine", "--json")[1])
    assert after["plans"][0]["step_s"] > before["plans"][0]["step_s"]
    assert before["hardware"] == "made up"


def test_a_picture_is_drawn_and_always_the_same(run: Run, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.svg", "b.svg")]
    for file in files:
        assert run("mixtral-8x7b", "--plot", str(file), "--json")[0] == 0
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert b"<svg" in first
    assert run("mixtral-8x7b", "--plot", str(tmp_path / "a.png"))[2].startswith("error: --plot ")
    assert "No such file" in run("mixtral-8x7b", "--plot", str(tmp_path / "no" / "a.svg"))[2]


def test_the_validation_table(run: Run) -> None:
    code, out, _ = run("--validate")
    assert code == 0
    assert "MISSED" in out
    assert "source: DeepEP" in out
    found = json.loads(run("--validate", "--json")[1])
    missed = sum(check["met"] is False for check in found)
    met = sum(check["met"] is True for check in found)
    assert f"{met} of {met + missed} are met, {missed} missed" in out


def test_what_is_shipped_is_listed(run: Run) -> None:
    out = run("--list")[1]
    cards = (
        *("mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v2-lite", "deepseek-v3"),
        *("kimi-k2", "glm-5", "gpt-oss-120b", "olmoe-1b-7b", "example-478b", "example-512-experts"),
    )
    machines = ("hgx-h100", "hgx-h200", "gb200-nvl72", "workstation-blackwell-x4", "h200-x1", "this-machine")
    assert set(cards) <= set(plan_files.card_names())
    assert all(name in out for name in (*cards, *machines))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "MODEL is missing"),
        (("llama-3",), "no file llama-3, and no such card; cards are deepseek-v2-lite, "),
        (("mixtral-8x7b", "--hardware", "abacus"), "machines are gb200-nvl72, "),
        (("mixtral-8x7b", "--dtype", "int3"), "dtype 'int3' is unknown; known are bf16, fp8, nvfp4"),
        (("mixtral-8x7b", "--dtype", "nvfp4"), "dtype nvfp4: flop_per_s of hardware hgx-h100 has bf16, fp8 only"),
        (("mixtral-8x7b", "--gpus", "0"), "num_gpus: Input should be greater than or equal to 1, got 0"),
        (("mixtral-8x7b", "--hardware", "workstation-blackwell-x4", "--gpus", "8"), "the outermost of tiers joins 4"),
        (("mixtral-8x7b", "--tokens-per-step", "0"), "--tokens-per-step: Input should be greater than or equal to 1"),
        (("mixtral-8x7b", "--context", "0"), "--context: Input should be"),
        (("mixtral-8x7b", "--skew", "nan"), "--skew: Input should be"),
        (("mixtral-8x7b", "--overlap", "2"), "--overlap: Input should be less than or equal to 1"),
        (("mixtral-8x7b", "--slo-itl-ms", "0"), "--slo-itl-ms: Input should be greater than 0"),
        (("mixtral-8x7b", "--replicas", "-1"), "--replicas is -1"),
        (("mixtral-8x7b", "--phase", "training"), "'training' is not one of"),
        (("mixtral-8x7b", "--calibration", "/no/file"), "/no/file: cannot be read as JSON"),
    ],
)
def test_errors_are_one_line(run: Run, args: tuple[str, ...], message: str) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold fields by name, found list"),
        (json.dumps({"hidden_size": 8, "num_hidden_layers": 2}), "config.json has no n_routed_experts"),
    ],
)
def test_a_wrong_model_file_is_one_line(run: Run, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(content)
    code, _, err = run(str(file))
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- 1", "must hold fields by name, found list"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("name: x", "Field required"),
    ],
)
def test_a_wrong_hardware_file_is_one_line(run: Run, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "h.yaml"
    file.write_text(content)
    code, _, err = run("mixtral-8x7b", "--hardware", str(file))
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_zero_bandwidth_names_the_field(run: Run, tmp_path: Path) -> None:
    file = write_hardware(tmp_path / "h.yaml", memory_bytes_per_s=0)
    code, _, err = run("mixtral-8x7b", "--hardware", str(file))
    assert code == 2
    assert "memory_bytes_per_s: Input should be greater than 0, got 0" in err


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; sys.argv = ['expertmesh', 'plan', 'deepseek-v3', '--gpus', '16', '--dtype', 'fp8', '--json']\n"
        "from expertmesh.actors.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'grpc', 'scipy', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
