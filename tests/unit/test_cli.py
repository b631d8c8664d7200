"""The client commands against a real server over fake workers, and how errors look."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from expertmesh.actors.cli import client, doctor, main, status
from expertmesh.actors.cli.network_reduction import network_reduction
from expertmesh.actors.cli.server_options import Server
from expertmesh.cluster.requests import SamplingParams
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1.admin_pb2 import AutoscalerStatus, ShardStatus, StatusResponse
from tests.in_a_thread import in_a_thread
from tests.unit.gateway_fakes import STATUS, FakeWorker, fake_output, fake_text, save_tokenizer
from tests.unit.gateway_server import running

CALLS = itertools.count()
Run = Callable[..., tuple[int, str, str]]


async def get_loads() -> list[dict[str, object]]:
    """Return what grows by a token of a prompt and two generated ones from one call to the next."""
    called = next(CALLS)
    loads = {"tokens": [3 * called, 2 * called, called, 0], "decode_tokens": 4 * called}
    return [{"layer": layer, **loads} for layer in (0, 1)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def url(tokenizer: Tokenizer) -> Iterator[str]:
    """Address of a server that runs in a thread of its own, as the commands block."""
    with in_a_thread(running(FakeWorker("a"), tokenizer=tokenizer, loads=get_loads, max_requests=1024)) as up:
        yield up.server.address


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; return exit code, stdout and stderr."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", *args])
        with pytest.raises(SystemExit) as caught:
            main.main()
        captured = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call


def expected(prompt_ids: list[int], max_tokens: int = 10, seed: int = 4) -> tuple[list[int], str]:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
    return fake_output(prompt_ids, sampling), fake_text(prompt_ids, sampling)


SHORT = ("--max-tokens", "10", "--seed", "4")


def test_generate_streams_text(run: Run, url: str, tokenizer: Tokenizer) -> None:
    code, out, err = run("generate", "hello", "--url", url, *SHORT)
    assert (code, out, err) == (0, expected(tokenizer.encode("hello"))[1] + "\n", "")


def test_generate_json_is_one_object(run: Run, url: str) -> None:
    code, out, err = run("generate", "--token-ids", "1,2,3", "--url", url, *SHORT, "--json", "--request-id", "mine")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert 0 < answer.pop("ttft_s") < 10
    token_ids, text = expected([1, 2, 3])
    assert answer == {
        "request_id": "mine",
        "text": text,
        "token_ids": token_ids,
        "finish_reason": "length",
        "usage": {"prompt_tokens": 3, "completion_tokens": 10},
    }


def test_generate_json_with_samples_logprobs_and_a_stop_string(run: Run, url: str) -> None:
    whole = expected([1, 2, 3], max_tokens=30)[1]
    options = ("--n", "2", "--logprobs", "1", "--stop", whole[5:8], "--max-tokens", "30", "--seed", "4", "--json")
    code, out, _ = run("generate", "--token-ids", "1,2,3", "--url", url, *options)
    answer = json.loads(out)
    assert code == 0
    assert (answer["text"], answer["finish_reason"]) == (whole[: whole.index(whole[5:8])], "stop")
    assert len(answer["outputs"]) == 2
    assert answer["outputs"][0]["text"] == answer["text"]
    assert answer["usage"]["completion_tokens"] == sum(len(output["token_ids"]) for output in answer["outputs"])
    first = answer["logprobs"][0]
    assert first == {"token_id": answer["token_ids"][0], "logprob": 0.0, "top": [{"token_id": 0, "logprob": 0.0}]}


def test_generate_prints_several_samples_one_after_the_other(run: Run, url: str) -> None:
    code, out, _ = run("generate", "--token-ids", "1,2,3", "--url", url, *SHORT, "--n", "2", "--logprobs", "0")
    lines = out.splitlines()
    start = lines.index("--- sample 0")
    assert code == 0
    assert lines[start + 1] == expected([1, 2, 3])[1]
    assert lines[start + 2].split() == [str(expected([1, 2, 3])[0][0]), "0.0000"]


def test_status_json_holds_the_contract(run: Run, url: str) -> None:
    code, out, _ = run("status", "--url", url, "--json")
    state = json.loads(out)
    assert code == 0
    assert state == json.loads(json.dumps(STATUS))


def test_status_prints_tables(run: Run, url: str) -> None:
    code, out, _ = run("status", "--url", url)
    assert code == 0
    for text in ("ready", "2 shards, 1 worker", "epoch 3", "0.875", "Expert shards", "8.0 GiB", "Attention workers"):
        assert text in out
    assert "3 shards and 1 workers wanted, 1.5 s ago" in out
    assert "shards go from 2 to 3: busy" in out
    assert "7 pairs of a token and an expert, beyond a capacity factor of 1.25; most of L0E1 5, L1E3 2" in " ".join(
        out.split()
    )


def test_messages_become_plain_values_with_numbers_and_zeros() -> None:
    plain = client.to_dict(StatusResponse(shards=[ShardStatus(weight_bytes=2**40)]))
    assert (plain["balancedness"], plain["epoch"], plain["workers"], plain["controller"]["pid"]) == (None, 0, [], 0)
    assert plain["shards"][0]["weight_bytes"] == 2**40
    assert client.to_dict(StatusResponse(balancedness=0.0))["balancedness"] == 0.0
    assert plain["autoscaler"] is None
    assert client.to_dict(StatusResponse(autoscaler=AutoscalerStatus()))["autoscaler"]["shards"] == 0


def test_status_before_traffic_and_without_a_controller_can_be_shown(url: str) -> None:
    state = {
        **status.fetch(Server(url=url)),
        "balancedness": None,
        "shards": [],
        "layer_traffic": [],
        "autoscaler": None,
    }
    state |= {"capacity_factor": None, "drops": []}
    state["controller"] = {"pid": 0, "node": ""}
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(status.render(state))
    assert "no traffic yet" in capture.get()
    assert "away" in capture.get()
    assert "capacity" not in capture.get()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("generate",), 2, "give either a PROMPT or --token-ids"),
        (("generate", "x", "--token-ids", "1"), 2, "give either a PROMPT or --token-ids"),
        (("generate", "--token-ids", "1,b"), 2, "--token-ids '1,b' is not a list of token ids"),
        (("generate", "--token-ids", "999"), 2, "token id 999 is outside the vocabulary of 257 tokens"),
        (("generate", "x", "--top-p", "2"), 2, "top_p is 2.0"),
        (("generate", "x", "--top-k", str(2**40)), 2, "outside what a request can hold"),
        (("generate", "x", "--seed", "-1"), 2, "--seed is -1"),
        (("generate", "x", "--n", "0"), 2, "--n is 0"),
        (("generate", "x", "--n", "99"), 2, "n is 99"),
        (("generate", "x", "--timeout-s", "0"), 2, "--timeout-s is 0.0"),
        (("generate", "x", "--max-tokens", "500", "--timeout-s", "0.05"), 1, "did not finish in time"),
        (("status", "--interval-s", "0"), 2, "--interval-s is 0.0"),
    ],
)
def test_errors_are_one_line(run: Run, url: str, args: tuple[str, ...], code: int, message: str) -> None:
    found_code, _, err = run(*args, "--url", url)
    assert found_code == code
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [("generate", "x", "--retries", "1"), ("status",), ("status", "--json")])
def test_a_server_that_is_not_there_is_one_line(run: Run, command: tuple[str, ...]) -> None:
    code, out, err = run(*command, "--url", "127.0.0.1:1")
    assert (code, out) == (1, "")
    assert err.startswith("error: no answer from 127.0.0.1:1: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("bad_url", ["localhost", "http://localhost:1", ":1", "localhost:x"])
def test_a_url_of_another_form_is_wrong_input(run: Run, bad_url: str) -> None:
    code, _, err = run("status", "--url", bad_url)
    assert (code, err) == (2, f"error: --url {bad_url!r} is not of the form host:port\n")


def test_an_unknown_command_is_wrong_usage_and_suggests_one(run: Run) -> None:
    code, _, err = run("statsu")
    assert code == 2
    assert "'status'" in err


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out[0].isdigit()


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['expertmesh', '--help']\n"
        "from expertmesh.actors.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'grpc'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for name in main.COMMANDS:
        assert name in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_each_command_has_help(run: Run, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert f" {name} [OPTIONS]" in out


def test_doctor_tells_what_there_is_and_what_is_missing(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["memory"]["total_bytes"] > found["memory"]["available_bytes"] > 0
    assert set(found["cpu"]["features"]) == {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    assert 0 < found["cpu"]["num_usable"] <= found["cpu"]["num_threads"]
    assert found["packages"]["torch"] is not None
    missing = {item["what"] for item in found["missing"]}
    assert ("GPU" in missing) == (not found["gpus"])


def test_doctor_prints_gpus_and_their_links(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    gpu = {"name": "Big GPU", "memory_bytes": 2**37, "compute_capability": "9.0"}
    monkeypatch.setattr(doctor, "_gpus", lambda: [gpu])
    monkeypatch.setattr(doctor, "_gpu_links", lambda: "GPU0 X NV18")
    reduction = network_reduction({}, [True, False], has_plugin=False)
    monkeypatch.setattr(doctor, "find_network_reduction", lambda _: reduction)
    monkeypatch.setattr(doctor, "_packages", lambda: dict.fromkeys(doctor.PACKAGES))
    code, out, _ = run("doctor")
    assert code == 0
    for text in ("Big GPU, 128.0 GiB", "GPU0 X NV18", "missing: cupy", "pip install 'expertmesh[gpu]'", "missing: ray"):
        assert text in out
    assert "off: GPUs 1 support no multicast" in out


@pytest.mark.parametrize(
    ("environment", "has_multicast", "has_plugin", "nvls", "sharp"),
    [
        ({}, [], False, "0 GPUs: nothing to reduce between", "no GPU"),
        ({}, [True], False, "1 GPUs: nothing to reduce between", "NCCL_COLLNET_ENABLE is not 1"),
        ({}, [True] * 8, True, "supported", "NCCL_COLLNET_ENABLE is not 1"),
        ({"NCCL_NVLS_ENABLE": "2", "NCCL_COLLNET_ENABLE": "1"}, [True] * 8, True, "supported", "supported"),
        ({"NCCL_NVLS_ENABLE": "0"}, [True] * 8, True, "NCCL_NVLS_ENABLE is 0", "NCCL_COLLNET_ENABLE is not 1"),
        ({"NCCL_COLLNET_ENABLE": "1"}, [True] * 2, False, "supported", "no network plugin for NCCL (libnccl-net)"),
    ],
)
def test_where_the_network_reduces(
    environment: dict[str, str], has_multicast: list[bool], has_plugin: bool, nvls: str, sharp: str
) -> None:
    found = network_reduction(environment, has_multicast, has_plugin)
    assert {kind: state["why"] for kind, state in found.items()} == {"nvls": nvls, "sharp": sharp}
    assert all(state["on"] == (state["why"] == "supported") for state in found.values())
