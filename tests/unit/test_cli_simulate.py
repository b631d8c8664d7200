"""`expertmesh simulate`: what it prints and writes, and how wrong input looks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from expertmesh.actors.cli import main
from tests.planner import CONFIG, machine, tier

Run = Callable[..., tuple[int, str, str]]
MADE_UP = ("--zipf", "0.8", "--rate", "4000", "--duration-s", "20")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in this process for a small model on a small machine; return exit code, stdout and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    hardware = machine(tier(domain_size=4), tier(domain_size=64, name="network"), num_gpus=8)
    (tmp_path / "hardware.yaml").write_text(yaml.safe_dump(json.loads(hardware.model_dump_json())))

    def call(*args: str) -> tuple[int, str, str]:
        own = ["--model", str(tmp_path / "config.json"), "--hardware", str(tmp_path / "hardware.yaml")]
        own += ["--dtype", "bf16", "--context", "64"]
        monkeypatch.setattr(sys, "argv", ["expertmesh", "simulate", *own, *args])
        with pytest.raises(SystemExit) as caught:
            main.main()
        captured = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call


def write_trace(monkeypatch: pytest.MonkeyPatch, file: Path, **changes: str) -> Path:
    shape = {"layers": "4", "experts": "16", "top-k": "2", "hidden-size": "64", "steps": "5", **changes}
    options = [text for name, value in shape.items() for text in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["expertmesh", "trace", "make", str(file), *options])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 0
    return file


def test_a_rack_that_fails_is_told(run: Run) -> None:
    """Racks are those of the innermost links: two of four shards."""
    code, out, err = run("--plan", "ep", *MADE_UP, "--fail", "5:rack-1", "--replicas", "2")
    assert (code, err) == (0, "")
    assert "8 GPUs of" in out
    assert "rack-1 fails, 4 shards; 0 experts had no other copy" in out
    assert "80000 tokens offered" in out
    assert "milliseconds of a step: p50 " in out


def test_json_has_figures_events_and_samples(run: Run) -> None:
    code, out, _ = run("--plan", "ep=4", *MADE_UP, "--fail", "5:shard-1", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["plan"] == {"attention_tp": 1, "attention_dp": 4, "ep": 4, "expert_tp": 1}
    assert found["tokens_offered"] == 80_000 == found["tokens_served"] + found["tokens_left"]
    assert found["lost_experts"] == 16
    assert found["step_s"]["p50"] <= found["step_s"]["p99"] <= found["step_s"]["max"]
    assert len({len(column) for column in found["samples"].values()}) == 1
    assert found["events"][0]["kind"] == "failure"


def test_a_trace_is_replayed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write_trace(monkeypatch, tmp_path / "a.trace")
    code, out, _ = run("--plan", "ep=4", "--trace", str(file), "--json")
    found = json.loads(out.splitlines()[-1])
    assert (code, found["duration_s"], found["tokens_offered"]) == (0, 5.0, 5 * 64)
    code, out, _ = run("--plan", "ep=4", "--trace", str(file), "--rate", "100", "--duration-s", "12.5", "--json")
    found = json.loads(out)
    assert (code, found["duration_s"], found["tokens_offered"]) == (0, 12.5, 1250)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"experts": "8"}, "its num_experts is 8, the model's 16"),
        ({"top-k": "3"}, "its top_k is 3, the model's 2"),
        ({"layers": "3"}, "its layers is (0, 1, 2), the model's (0, 1, 2, 3)"),
        ({"hidden-size": "32"}, "its hidden_size is 32, the model's 64"),
    ],
)
def test_a_trace_of_another_model_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, str], text: str
) -> None:
    file = write_trace(monkeypatch, tmp_path / "a.trace", **changes)
    code, _, err = run("--plan", "ep=4", "--trace", str(file))
    assert code == 2
    assert f"error: --trace {file}: a trace of another model: {text}" in err


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
@pytest.mark.parametrize("options", [("--fail", "5:shard-1"), ("--sweep", "2,4")])
def test_plots(run: Run, tmp_path: Path, name: str, options: tuple[str, ...]) -> None:
    file = tmp_path / name
    assert run("--plan", "ep=4", *MADE_UP, *options, "--plot", str(file))[0] == 0
    if file.suffix == ".png":
        assert file.read_bytes().startswith(b"\x89PNG")
    else:
        assert file.read_text().rstrip().endswith("</svg>")


def test_a_sweep_prints_a_table_and_the_knee(run: Run) -> None:
    code, out, _ = run("--plan", "ep=4", *MADE_UP, "--sweep", "8,2,4")
    assert code == 0
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")] == ["2", "4", "8"]
    assert "shards" in out.splitlines()[-1]
    code, out, _ = run("--plan", "ep=4", *MADE_UP, "--sweep", "2,4,8", "--json")
    found = json.loads(out)
    assert [one["shards"] for one in found["points"]] == [2, 4, 8]
    assert found["knee"] in (2, 4, 8)


def test_the_autoscaler_runs_up_to_the_most_shards(run: Run) -> None:
    options = ("--zipf", "0", "--rate", "0:1000,100:1000000", "--duration-s", "150", "--start-s", "5")
    code, out, _ = run("--plan", "ep=2", *options, "--max-shards", "6", "--max-batch-tokens", "65536", "--json")
    assert code == 0
    shards = json.loads(out)["shards"]
    assert shards["min"] == 2 < shards["max"] <= 6


def test_a_plan_may_be_recommended_or_in_a_file(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"ep": 4, "expert_tp": 2, "attention_tp": 2}))
    code, out, _ = run("--plan", str(plan), *MADE_UP, "--json")
    assert code == 0
    assert json.loads(out)["plan"] == {"attention_tp": 2, "attention_dp": 4, "ep": 4, "expert_tp": 2}
    assert run("--plan", "auto", *MADE_UP)[0] == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "one of --trace FILE, and --zipf S or --topics SECONDS, is needed"),
        (("--zipf", "1"), "--rate is needed"),
        (("--zipf", "1", "--rate", "0"), "--rate: it is 0 all the time"),
        (("--zipf", "1", "--rate", "0:5,x"), "--rate 0:5,x: 'x' is not like"),
        (("--zipf", "1", "--rate", "9:5,3:1"), "--rate: its times must rise"),
        (("--zipf", "-1", "--rate", "5"), "zipf: a skew of -1.0"),
        (("--topics", "-1", "--rate", "5"), "topics: -1.0 s"),
        ((*MADE_UP, "--duration-s", "0"), "--duration-s is 0"),
        ((*MADE_UP, "--seed", "-1"), "--seed is -1"),
        ((*MADE_UP, "--plan", "ep=16"), "it takes 16 GPUs, and num_gpus of hardware"),
        ((*MADE_UP, "--plan", "ep=2,attention_tp=4"), "is not attention_tp=4"),
        ((*MADE_UP, "--plan", "ep=6,attention_tp=3"), "heads not divisible: 8 by attention_tp=3"),
        ((*MADE_UP, "--plan", "attention_tp=4"), "ep is missing"),
        ((*MADE_UP, "--plan", "ep=4,width=2"), "unknown field width"),
        ((*MADE_UP, "--plan", "ep=0"), "ep=0; it must be a whole number, at least 1"),
        ((*MADE_UP, "--plan", "nothing"), "no such file, and 'nothing' is not like ep=16"),
        ((*MADE_UP, "--plan", "ep=4,pp=2"), "plan: pp=2; one stage"),
        ((*MADE_UP, "--plan", "ep=4", "--fail", "5:shard-9"), "--fail 5:shard-9: no shard-9; there are shard-0 to"),
        ((*MADE_UP, "--plan", "ep=4", "--fail", "5:rack-1"), "--fail 5:rack-1: no rack-1; there are rack-0 to rack-0"),
        ((*MADE_UP, "--plan", "ep=4", "--replicas", "5"), "5"),
        ((*MADE_UP, "--plan", "ep=4", "--pace-s", "-1"), "--pace-s: "),
        ((*MADE_UP, "--plan", "ep=4", "--checkpoint-gb-s", "0"), "--checkpoint-gb-s: "),
        ((*MADE_UP, "--plan", "ep=4", "--overlap", "2"), "--overlap: "),
        ((*MADE_UP, "--plan", "ep=4", "--max-shards", "9"), "--max-shards: 9 shards take 9 GPUs"),
        ((*MADE_UP, "--plan", "ep=4", "--max-shards", "2", "--min-shards", "3"), "is above max-shards=2"),
        ((*MADE_UP, "--plan", "ep=4", "--sweep", "4,x"), "--sweep 4,x: it must be numbers of shards"),
        ((*MADE_UP, "--plan", "ep=4", "--sweep", "16"), "--sweep: 16 shards take 16 GPUs"),
        ((*MADE_UP, "--plan", "ep=4", "--plot", "a.gif"), "--plot a.gif: a PNG or an SVG is drawn"),
        ((*MADE_UP, "--plan", "ep=4", "--dtype", "int3"), "dtype 'int3' is unknown"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_field(run: Run, options: tuple[str, ...], text: str) -> None:
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert text in err
