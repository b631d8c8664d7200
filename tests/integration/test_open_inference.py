"""tritonclient, unchanged from the index, against a real server.

It needs an older protobuf than the server: it has a virtual environment of its own, made once and kept.
"""

import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import Server

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENT = "tritonclient[grpc]==2.73.0"
ENVIRONMENT = ROOT / ".venv" / "triton-client"
TEXTS = ("def main():", "This program is free software", "The value")


@pytest.fixture(scope="module")
def triton_python() -> Path:
    """The interpreter of an environment with tritonclient; skips where no package index can be reached."""
    python, marker = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if marker.is_file() and marker.read_text() == REQUIREMENT:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True, timeout=100)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", REQUIREMENT]
    done = subprocess.run([python, *install], capture_output=True, text=True, check=False, timeout=250)
    # pip says so of each try that did not reach the index.
    if done.returncode and "Retrying" in done.stderr:
        pytest.skip(f"pip reaches no index to install {REQUIREMENT} from: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    marker.write_text(REQUIREMENT)
    return python


@pytest.fixture(scope="module")
def seen(triton_python: Path, pocket: Server) -> dict[str, Any]:
    """What tritonclient got from the server."""
    script = Path(__file__).with_name("triton_client.py")
    arguments = [pocket.address, pocket.status().model.name, *TEXTS]
    done = subprocess.run([triton_python, script, *arguments], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = json.loads(done.stdout)
    return read


@pytest.fixture(scope="module")
def expected(pocket: Server) -> list[str]:
    """The texts as the server's own protocol gives them."""
    with pocket.channel() as channel:
        stub = InferenceStub(channel)
        requests = [GenerateRequest(text=text, max_tokens=24, ignore_eos=True) for text in TEXTS]
        return ["".join(one.text for one in stub.Generate(request, timeout=60)) for request in requests]


def test_the_server_is_live_and_ready_and_describes_itself(seen: dict[str, Any], pocket: Server) -> None:
    name = pocket.status().model.name
    assert (seen["live"], seen["ready"], seen["model_ready"]) == (True, True, [True, False])
    assert seen["server"]["name"] == "expertmesh"
    assert (seen["metadata"]["name"], seen["metadata"]["versions"]) == (name, ["1"])
    assert {"name": "text_input", "datatype": "BYTES", "shape": ["1"]} in seen["metadata"]["inputs"]
    assert [one["name"] for one in seen["metadata"]["outputs"]] == ["text_output", "output_ids", "finish_reason"]
    assert seen["config"]["model_transaction_policy"] == {"decoupled": True}
    assert [one["data_type"] for one in seen["config"]["output"]] == ["TYPE_STRING", "TYPE_INT32", "TYPE_STRING"]


def test_answers_equal_those_of_the_servers_own_protocol(
    seen: dict[str, Any], expected: list[str], pocket: Server
) -> None:
    infer = seen["infer"]
    whole = infer["whole"]
    assert whole["text_output"] == infer["async"]["text_output"] == seen["aio"]["whole"]["text_output"] == [expected[0]]
    assert infer["echoed"]["text_output"] == [TEXTS[0] + expected[0]]
    assert (whole["id"], whole["finish_reason"], len(whole["output_ids"])) == ("whole", ["length"], 24)
    assert whole["parameters"]["completion_tokens"] == {"int64_param": "24"}
    request = GenerateRequest(token_ids=TokenIds(ids=[5, 6, 7]), max_tokens=24, ignore_eos=True)
    with pocket.channel() as channel:
        ids = list(InferenceStub(channel).GenerateOnce(request, timeout=60).outputs[0].token_ids)
    assert infer["by_ids"]["output_ids"] == ids
    assert infer["by_ids"]["text_output"] is None


def test_streams_bring_all_texts_in_pieces_by_their_ids(seen: dict[str, Any], expected: list[str]) -> None:
    for pieces, has_empty_final in ((seen["stream"], True), (seen["aio"]["pieces"], False)):
        texts: dict[str, list[str]] = defaultdict(list)
        finals = []
        for piece in pieces:
            if "error" in piece:
                continue
            texts[piece["id"]] += piece["text_output"] or []
            if piece["parameters"]["triton_final_response"]["bool_param"]:
                finals.append((piece["id"], piece["text_output"] is None))
        assert {name: "".join(parts) for name, parts in texts.items()} == dict(zip("012", expected, strict=True))
        assert all(len(parts) > 1 for parts in texts.values())
        assert sorted(finals) == [(name, has_empty_final) for name in "012"]


def test_a_wrong_request_of_a_stream_is_an_error_that_names_it(seen: dict[str, Any]) -> None:
    errors = [piece["error"] for piece in seen["stream"] if "error" in piece]
    assert errors == ["request wrong: max_tokens is -1; it must be at least 1"]


def test_refusals_are_statuses_with_a_line_that_names_what_is_wrong(seen: dict[str, Any], pocket: Server) -> None:
    name = pocket.status().model.name
    vocabulary = pocket.status().model.vocab_size
    assert seen["refusals"] == [
        ["StatusCode.NOT_FOUND", f"model 'other' is not served; '{name}' is"],
        ["StatusCode.NOT_FOUND", f"version '2' of '{name}' is not served; '1' is"],
        ["StatusCode.INVALID_ARGUMENT", "max_tokens is 0; it must be at least 1"],
        ["StatusCode.INVALID_ARGUMENT", "top_k: datatype is BYTES; it must be INT32 or INT64 or UINT32 or UINT64"],
        [
            "StatusCode.INVALID_ARGUMENT",
            f"input_ids: token id 1000000 is outside the vocabulary of {vocabulary} tokens",
        ],
        ["StatusCode.INVALID_ARGUMENT", "stream: ModelInfer gives one response; use ModelStreamInfer"],
        ["StatusCode.NOT_FOUND", f"model 'other' is not served; '{name}' is"],
    ]


def test_a_cancelled_stream_frees_its_pages(seen: dict[str, Any], pocket: Server) -> None:
    assert seen["abandoned"] >= 1
    deadline_s = time.monotonic() + 120
    while not all(w.running == 0 and w.free_pages == w.num_pages for w in pocket.status().workers):
        assert time.monotonic() < deadline_s, pocket.status().workers
        time.sleep(0.05)
