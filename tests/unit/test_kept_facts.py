"""Facts of a checkpoint that are kept are those of that checkpoint, or none."""

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from expertmesh.cluster.model_info import CheckpointFacts, ModelInfo
from expertmesh.models.kept_facts import facts_path, keep_facts, kept_facts

FACTS = CheckpointFacts(
    info=ModelInfo(
        name="tiny",
        architecture="TinyForCausalLM",
        dtype="bfloat16",
        num_layers=3,
        moe_layers=(1, 2),
        num_experts=8,
        top_k=2,
        hidden_size=8,
        vocab_size=128,
        max_context=64,
        eos_token_ids=(5,),
        has_tokenizer=True,
    ),
    dense_bytes=10,
    expert_bytes=20,
    expert_width=30,
)


def write_tensors(path: Path, names: list[str]) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [], "data_offsets": [0, 0]} for name in names}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    write_tensors(directory / "model.safetensors", ["a"])
    return directory


def test_what_is_kept_comes_back(checkpoint: Path) -> None:
    path = facts_path(checkpoint, "auto", 0)
    assert kept_facts(path) is None
    keep_facts(FACTS, path)
    assert kept_facts(facts_path(checkpoint, "auto", 0)) == FACTS


def rename(directory: Path) -> Path:
    return directory.rename(directory.with_name("other"))


def change_config(directory: Path) -> Path:
    (directory / "config.json").write_text('{"a": 1}')
    return directory


def change_tensors(directory: Path) -> Path:
    write_tensors(directory / "model.safetensors", ["b"])
    return directory


def cut_short(directory: Path) -> Path:
    (directory / "model.safetensors").write_bytes(b"\1\2")
    return directory


def grow(directory: Path) -> Path:
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"x")
    return directory


def add_tokenizer(directory: Path) -> Path:
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.mark.parametrize("change", [rename, change_config, change_tensors, cut_short, grow, add_tokenizer])
def test_another_checkpoint_has_others(change: Callable[[Path], Path], checkpoint: Path) -> None:
    before = facts_path(checkpoint, "auto", 0)
    assert facts_path(change(checkpoint), "auto", 0) != before


def test_other_settings_have_others(checkpoint: Path) -> None:
    paths = [facts_path(checkpoint, *how) for how in (("auto", 0), ("float32", 0), ("auto", 64))]
    assert len(set(paths)) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"info": {}}', b"\xff"])
def test_a_damaged_one_is_none(content: bytes, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = facts_path(checkpoint, "auto", 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert kept_facts(path) is None
    assert f"{path} is damaged" in caplog.text


def test_a_cache_that_cannot_be_written_is_said(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = facts_path(checkpoint, "auto", 0)
    path.parent.parent.mkdir()
    path.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        keep_facts(FACTS, path)
    assert "not kept" in caplog.text
