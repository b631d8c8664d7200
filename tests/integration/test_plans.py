"""Plans that run: each kind gives transformers' own tokens, shows itself in `status`, and takes faults and scaling."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.families import generate
from tests.integration.conftest import CLI, POCKET, Server, serving
from tests.integration.streams import LiveStreams, member_pids, status_when

NUM_TOKENS = 48
PROMPT = "This program is free software"
IN_FLOAT32 = ("--dtype", "float32")


@pytest.fixture(scope="module")
def expected() -> tuple[list[int], list[int]]:
    """A prompt, and transformers' own greedy continuation."""
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    prompt: list[int] = AutoTokenizer.from_pretrained(POCKET)(PROMPT).input_ids
    return prompt, generate(model, prompt, NUM_TOKENS)


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(POCKET, tmp_path_factory.mktemp("tp"), "--shards", "2", "--plan", "tp", *IN_FLOAT32) as server:
        yield server


def tokens_of(server: Server, prompt: list[int]) -> list[int]:
    request = GenerateRequest(token_ids=TokenIds(ids=prompt), max_tokens=NUM_TOKENS, ignore_eos=True)
    with server.channel() as channel:
        return [t for r in InferenceStub(channel).Generate(request, timeout=60) for t in r.token_ids]


def scale(server: Server, shards: int) -> None:
    """Scale; for a moment after a shard was lost the controller may say to ask again."""
    command = [*CLI, "scale", "--shards", str(shards), "--wait", "--json", "--url", server.address]
    deadline_s = time.monotonic() + 120
    while True:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.stdout:
            break
        assert time.monotonic() < deadline_s, done.stderr
        time.sleep(1)
    assert json.loads(done.stdout)["phase"] == "DONE", done.stdout + done.stderr


def test_tensor_parallel_experts_give_the_same_tokens_and_show(
    sliced: Server, expected: tuple[list[int], list[int]]
) -> None:
    prompt, tokens = expected
    assert tokens_of(sliced, prompt) == tokens
    status = sliced.status()
    assert status.plan == "experts tp=2 over 2 shards x 1 replicas, attention dp=1"
    assert status.model.expert_tp == 2
    for layer in status.layer_traffic:
        # Partial sums alone: each row that goes out comes back, in this dtype without pairs.
        assert layer.combine_bytes == 0
        rows = layer.reduce_bytes // (128 * 4)
        assert layer.dispatch_bytes == layer.reduce_bytes + rows // 2 * 4 * 2 * 12
    assert {shard.num_slots for shard in status.shards} == {4 * 16}


def test_a_lost_shard_and_another_number_of_shards_change_no_token(sliced: Server) -> None:
    streams = LiveStreams(sliced)
    with streams.running():
        psutil.Process(member_pids(sliced.status())["shard-0"]).kill()
        status_when(sliced)
        scale(sliced, 3)
        assert min(shard.num_slots for shard in status_when(sliced).shards) >= 2 * 4 * 16 // 3
        scale(sliced, 2)


def test_groups_of_shards_and_a_file(tmp_path: Path, expected: tuple[list[int], list[int]]) -> None:
    """A plan as `plan --json` prints it: two groups of experts, each of two slices."""
    prompt, tokens = expected
    plan = {"attention_tp": 1, "attention_dp": 1, "ep": 2, "expert_tp": 2, "pp": 1, "instances": 1}
    (tmp_path / "plan.json").write_text(json.dumps({"plans": [plan], "recommended": 0}))
    with serving(POCKET, tmp_path, "--plan", str(tmp_path / "plan.json"), *IN_FLOAT32) as server:
        assert "ep=2, expert_tp=2, attention_dp=1" in server.log.read_text()
        assert tokens_of(server, prompt) == tokens
        status = server.status()
        assert status.plan == "experts tp=2 over 4 shards x 1 replicas, attention dp=1"
        assert {shard.num_slots for shard in status.shards} == {2 * 16}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--plan", "pp"), "plan 'pp' is not one of auto, ep, tp, tpxep, nor a file"),
        (("--plan", "tpxep", "--shards", "2"), "shards=2"),
        (("--plan", "tp", "--shards", "3"), "expert_tp=3 does not divide the experts' width of 128"),
    ],
)
def test_plans_that_do_not_fit_are_refused(options: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    command = [*CLI, "serve", str(POCKET), "--grpc-port", "0", "--no-http", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
