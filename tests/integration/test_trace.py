"""A trace of live traffic: what it has is what the workers were asked for meanwhile."""

import json
import subprocess
import time
from pathlib import Path

import numpy as np

from expertmesh.cluster.traces import TraceHeader, TraceReader
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import CLI, POCKET, Server

SECONDS, PROMPT, NEW = 6, 40, 16


def test_the_tokens_of_a_trace_are_those_that_were_computed(pocket: Server, tmp_path: Path) -> None:
    file = tmp_path / "pocket.trace"
    command = [*CLI, "trace", "record", str(file), "--url", pocket.address, "--seconds", str(SECONDS), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as recording:
        try:
            time.sleep(SECONDS / 2)  # it takes a second or so to look for the first time
            request = GenerateRequest(
                token_ids=TokenIds(ids=list(range(5, 5 + PROMPT))), max_tokens=NEW, ignore_eos=True
            )
            with pocket.channel() as channel:
                assert sum(len(r.token_ids) for r in InferenceStub(channel).Generate(request, timeout=60)) == NEW
            out, err = recording.communicate(timeout=60)
        finally:
            recording.kill()
    assert recording.returncode == 0, err
    told = json.loads(out)
    # The last token is drawn and not computed; what was computed of the prompt may have been kept from another test.
    assert told["decode_tokens"] == NEW - 1
    assert 1 <= told["prefill_tokens"] <= PROMPT
    reader = TraceReader(file.read_bytes())
    config = json.loads((POCKET / "config.json").read_text())
    reader.header.require(
        TraceHeader(
            model=POCKET.name,
            layers=tuple(range(config["num_hidden_layers"])),
            num_experts=config["num_local_experts"],
            top_k=config["num_experts_per_tok"],
            hidden_size=config["hidden_size"],
        )
    )
    steps = list(reader.steps())
    assert SECONDS - 1 <= len(steps) <= SECONDS
    pairs = (told["prefill_tokens"] + told["decode_tokens"]) * config["num_experts_per_tok"]
    assert (np.sum([step.load_LE.sum(axis=1) for step in steps], axis=0) == pairs).all()
