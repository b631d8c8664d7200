"""Checkpoints: single experts and the dense half to the bit, in any dtype, and only the bytes asked for are read."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from expertmesh.cluster.errors import CorruptCheckpointError, InputError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.models.architecture import Architecture, open_architecture
from expertmesh.models.describe import inspect_checkpoint
from expertmesh.models.expert_slots import ExpertSlots, LayerSlots
from expertmesh.models.loading import CheckpointWeights
from expertmesh.models.tensor_files import INDEX_FILE, SINGLE_FILE, TensorFiles
from tests.families import FAMILIES, write_checkpoint

CPU = torch.device("cpu")
# One tensor an expert on disk: mixtral, qwen3_moe, deepseek_v3 (with a dense layer and shared experts). All experts of
# a layer in one tensor: granitemoe, gpt_oss (transposed, with biases), inkling2_text (gate and up interleaved).
LAYOUTS = ("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss", "inkling2_text")
INKLING2_TEXT = {
    "num_hidden_layers": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "head_dim": 16,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "d_rel": 4,
    "rel_extent": 8,
    "unpadded_vocab_size": 128,
}
NUM_EXPERTS = 8
SMALL_FILES = "60KB"
# What a router adds to its scores is never held in half precision.
ROUTING_BIAS = "e_score_correction_bias"


def write(family: str, directory: Path, *, max_shard_size: str = "50GB", **changes: object) -> PreTrainedModel:
    """Write a family's checkpoint with changed settings, or one of the family that only this file needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, {**FAMILIES.get(family, INKLING2_TEXT), **changes})
        return write_checkpoint(family, directory, max_shard_size=max_shard_size)


@pytest.fixture(scope="module", params=["one file", "many files"])
def max_shard_size(request: pytest.FixtureRequest) -> str:
    return "50GB" if request.param == "one file" else SMALL_FILES


@pytest.fixture(scope="module", params=LAYOUTS)
def written(
    request: pytest.FixtureRequest, max_shard_size: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedModel]:
    """A checkpoint of each layout, and the model that was written."""
    directory = tmp_path_factory.mktemp(request.param)
    model = write(request.param, directory, max_shard_size=max_shard_size)
    assert (directory / INDEX_FILE).is_file() == (max_shard_size == SMALL_FILES)
    return directory, model


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one tensor an expert, in one file."""
    directory = tmp_path_factory.mktemp("qwen3_moe")
    write("qwen3_moe", directory)
    return directory


def expert_parameters(model: PreTrainedModel, architecture: Architecture) -> dict[ExpertKey, dict[str, Tensor]]:
    """Return each expert's parameters of a whole model, by the short names that load_expert gives them."""
    name_of = {id(module): name for name, module in architecture.model.named_modules()}
    return {
        ExpertKey(layer, expert): {
            short: tensor[expert] for short, tensor in model.get_submodule(name_of[id(module)]).named_parameters()
        }
        for layer, module in architecture.experts_by_layer.items()
        for expert in range(architecture.num_experts)
    }


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def all_keys(architecture: Architecture) -> list[ExpertKey]:
    return [ExpertKey(layer, e) for layer in architecture.moe_layers for e in range(architecture.num_experts)]


def load_dense(directory: Path, dtype: str = "auto") -> tuple[CheckpointWeights, PreTrainedModel]:
    weights = CheckpointWeights(open_architecture(directory, dtype))
    return weights, weights.load_dense(CPU)


def check_dense(dense: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Check that the dense half is the whole model less its routed experts, to the bit, buffers too."""
    mine = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    theirs = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    assert set(theirs) - set(mine) == {name for name in theirs if re.search(r"\.experts\.[a-z_]+$", name)}
    assert not set(mine) - set(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


# What is loaded.


def test_experts_equal_the_written_models_to_the_bit(written: tuple[Path, PreTrainedModel]) -> None:
    directory, model = written
    architecture = open_architecture(directory)
    weights = CheckpointWeights(architecture)
    expected = expert_parameters(model, architecture)
    assert len(expected) == NUM_EXPERTS * len(architecture.moe_layers) > 0
    for key, tensors in expected.items():
        got = weights.load_expert(key)
        assert set(got) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(got[name], tensor), f"{key} {name}"
        assert num_bytes(got.values()) == weights.expert_bytes()


def test_the_dense_half_equals_the_written_models_to_the_bit(written: tuple[Path, PreTrainedModel]) -> None:
    directory, model = written
    weights, dense = load_dense(directory)
    check_dense(dense, model)
    assert num_bytes(dense.parameters()) == weights.dense_bytes()
    for module in weights.architecture.experts_by_layer.values():
        assert not list(module.parameters())


def test_workers_and_experts_together_are_the_whole_model(written: tuple[Path, PreTrainedModel]) -> None:
    """Invariant 8: the attention tier holds no routed expert, a shard nothing but its slots; nothing is left over."""
    directory, model = written
    weights, dense = load_dense(directory)
    halves = [
        ExpertSlots(weights, keys, CPU)
        for keys in (all_keys(weights.architecture)[::2], all_keys(weights.architecture)[1::2])
    ]
    assert num_bytes(dense.parameters()) + sum(half.weight_bytes for half in halves) == num_bytes(model.parameters())
    assert [half.num_slots for half in halves] == [4 * len(weights.architecture.moe_layers)] * 2
    assert all(half.weight_bytes == half.num_slots * weights.expert_bytes() for half in halves)


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    model = write("qwen3_moe", tmp_path, tie_word_embeddings=True)
    weights, dense = load_dense(tmp_path)
    assert "lm_head.weight" not in weights.files.names()
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    check_dense(dense, model)
    assert num_bytes(dense.parameters()) == weights.dense_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", [*LAYOUTS, "ernie4_5_moe"])
def test_another_dtype_is_what_from_pretrained_makes_of_it(family: str, dtype: str, tmp_path: Path) -> None:
    """Tensors that a family keeps in float32 too: ernie's router and deepseek's routing bias."""
    write(family, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    weights, dense = load_dense(tmp_path, dtype)
    check_dense(dense, whole)
    assert num_bytes(dense.parameters()) == weights.dense_bytes()
    assert all(b.dtype == torch.float32 for name, b in dense.named_buffers() if name.endswith(ROUTING_BIAS))
    expected = expert_parameters(whole, weights.architecture)
    for key in all_keys(weights.architecture)[::5]:
        for name, tensor in weights.load_expert(key).items():
            assert tensor.dtype == getattr(torch, dtype)
            assert torch.equal(tensor, expected[key][name])
        assert num_bytes(weights.load_expert(key).values()) == weights.expert_bytes()


def test_the_checkpoints_own_dtype_is_the_default(tmp_path: Path) -> None:
    write("qwen3_moe", tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    weights, dense = load_dense(tmp_path)
    assert weights.architecture.dtype == torch.bfloat16
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    assert inspect_checkpoint(tmp_path, "auto", 0).info.dtype == "bfloat16"


def test_inspection_tells_the_sizes_that_loading_then_takes(qwen3_moe: Path) -> None:
    facts = inspect_checkpoint(qwen3_moe, "bfloat16", 0)
    weights, dense = load_dense(qwen3_moe, "bfloat16")
    assert facts.dense_bytes == num_bytes(dense.parameters())
    assert facts.expert_bytes == num_bytes(weights.load_expert(ExpertKey(1, 5)).values())
    assert (facts.info.num_experts, facts.info.moe_layers, facts.info.top_k) == (NUM_EXPERTS, (0, 1, 2), 2)
    assert (facts.info.dtype, facts.info.max_context, facts.info.eos_token_ids) == ("bfloat16", 256, (2,))


# What is read.


class Recorder:
    """Stands before a lazy slice and notes the elements that are read."""

    def __init__(self, inner: Any, name: str, read: dict[str, int]) -> None:
        self._inner, self._name, self._read = inner, name, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, index: Any) -> Tensor:
        tensor: Tensor = self._inner[index]
        self._read[self._name] = self._read.get(self._name, 0) + tensor.numel()
        return tensor


@pytest.fixture
def elements_read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Elements read of each tensor of a checkpoint."""
    read: dict[str, int] = {}
    slice_of = TensorFiles.slice
    monkeypatch.setattr(TensorFiles, "slice", lambda files, name: Recorder(slice_of(files, name), name, read))
    return read


def test_load_expert_reads_that_expert_alone(
    written: tuple[Path, PreTrainedModel], elements_read: dict[str, int]
) -> None:
    weights = CheckpointWeights(open_architecture(written[0]))
    assert not elements_read, "opening reads headers only"
    layer = weights.architecture.moe_layers[-1]
    got = weights.load_expert(ExpertKey(layer, 5))
    assert sum(elements_read.values()) == sum(tensor.numel() for tensor in got.values())
    assert all(f"layers.{layer}." in name for name in elements_read)
    numbered = [name for name in elements_read if re.search(r"experts\.\d", name)]
    assert all("experts.5." in name for name in numbered)


def test_load_dense_reads_no_expert(written: tuple[Path, PreTrainedModel], elements_read: dict[str, int]) -> None:
    weights = CheckpointWeights(open_architecture(written[0]))
    dense = weights.load_dense(CPU)
    dense_elements = sum(tensor.numel() for tensor in dense.state_dict().values())
    assert sum(elements_read.values()) == dense_elements


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_an_expert_is_read_where_every_other_byte_is_lost(family: str, tmp_path: Path) -> None:
    """Bytes of others, overwritten after opening, do not matter: only the expert's own part of the file is read."""
    model = write(family, tmp_path)
    weights = CheckpointWeights(open_architecture(tmp_path))
    key, other = ExpertKey(1, 3), ExpertKey(1, 4)
    lose_all_but(key, tmp_path / SINGLE_FILE)
    expected = expert_parameters(model, weights.architecture)[key]
    got = weights.load_expert(key)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert all(tensor.isnan().all() for tensor in weights.load_expert(other).values()), "nothing was lost"


def lose_all_but(key: ExpertKey, path: Path) -> None:
    """Overwrite all tensors in place with one bits (NaN in float32), all but those of one expert."""
    old = path.read_bytes()
    data_start = 8 + int.from_bytes(old[:8], "little")
    new = bytearray(old[:data_start].ljust(len(old), b"\xff"))
    for name, entry in json.loads(old[8:data_start]).items():
        if f"layers.{key.layer}." not in name:
            continue
        first, last = (data_start + offset for offset in entry["data_offsets"])
        if "input_linear" in name or "output_linear" in name:
            size = (last - first) // NUM_EXPERTS
            first, last = first + key.expert * size, first + (key.expert + 1) * size
        elif f"experts.{key.expert}." not in name:
            continue
        new[first:last] = old[first:last]
    with path.open("r+b") as file:
        file.write(new)


@pytest.mark.parametrize("key", [ExpertKey(0, NUM_EXPERTS), ExpertKey(0, -1), ExpertKey(3, 0)], ids=str)
def test_an_expert_that_is_not_there_is_refused(key: ExpertKey, qwen3_moe: Path) -> None:
    weights = CheckpointWeights(open_architecture(qwen3_moe))
    with pytest.raises(InputError, match=re.escape(f"{key}: the model has layers (0, 1, 2), experts 0 to 7")):
        weights.load_expert(key)


# Slots.


def test_slots_hold_what_is_asked_for_and_refuse_an_expert_twice(qwen3_moe: Path) -> None:
    weights = CheckpointWeights(open_architecture(qwen3_moe))
    slots = ExpertSlots(weights, [ExpertKey(0, 6), ExpertKey(0, 1), ExpertKey(2, 3)], CPU)
    assert slots.num_slots == 3
    assert slots.weight_bytes == 3 * weights.expert_bytes()
    first = slots.layer(0)
    assert first is not None
    slot_P = first.slots_of(torch.tensor([1, 6, 1]))
    assert slot_P is not None
    assert [first.experts[slot] for slot in slot_P] == [1, 6, 1]
    assert first.slots_of(torch.tensor([1, 3])) is None
    assert slots.layer(1) is None
    with pytest.raises(InputError, match=r"layer 1: cannot add experts \[2, 2\] to \[\]"):
        ExpertSlots(weights, [ExpertKey(1, 2), ExpertKey(1, 2)], CPU)
    with pytest.raises(InputError, match=r"layer 0: cannot add experts \[1\] to \[1, 6\]"):
        slots.add(0, [1], weights.load_expert)


def test_experts_come_and_go_and_a_computation_under_way_keeps_those_it_began_with(qwen3_moe: Path) -> None:
    weights = CheckpointWeights(open_architecture(qwen3_moe))
    slots = ExpertSlots(weights, [ExpertKey(0, 6), ExpertKey(0, 1), ExpertKey(2, 3)], CPU)
    hidden_TH = torch.randn(3, weights.architecture.config.hidden_size, generator=torch.Generator().manual_seed(0))
    row_P, one_P = torch.arange(3), torch.ones(3)

    def run(layer: LayerSlots | None, expert: int) -> torch.Tensor:
        assert layer is not None
        slot_P = layer.slots_of(torch.full((3,), expert))
        assert slot_P is not None
        return layer.run(hidden_TH, row_P, slot_P, one_P)

    before = slots.layer(0)
    old_1, old_6 = run(before, 1), run(before, 6)
    slots.add(0, [4, 0], weights.load_expert)
    assert slots.keys == {ExpertKey(0, e) for e in (6, 1, 4, 0)} | {ExpertKey(2, 3)}
    slots.keep([ExpertKey(0, 4), ExpertKey(0, 1), ExpertKey(1, 1)])
    assert slots.keys == {ExpertKey(0, 4), ExpertKey(0, 1)}
    assert slots.weight_bytes == 2 * weights.expert_bytes()
    fresh = ExpertSlots(weights, [ExpertKey(0, 4)], CPU)
    assert torch.equal(run(slots.layer(0), 4), run(fresh.layer(0), 4))
    assert torch.equal(run(slots.layer(0), 1), old_1)
    assert torch.equal(run(before, 6), old_6)


def test_experts_that_cannot_be_read_change_nothing(qwen3_moe: Path) -> None:
    weights = CheckpointWeights(open_architecture(qwen3_moe))
    slots = ExpertSlots(weights, [ExpertKey(0, 6)], CPU)

    def read(key: ExpertKey) -> dict[str, torch.Tensor]:
        if key.expert == 2:
            raise CorruptCheckpointError("damaged")
        return weights.load_expert(key)

    with pytest.raises(CorruptCheckpointError):
        slots.add(0, [1, 2], read)
    assert slots.keys == {ExpertKey(0, 6)}


@pytest.mark.parametrize("family", LAYOUTS)
def test_slots_compute_what_the_models_own_experts_compute(family: str, tmp_path: Path) -> None:
    model = write(family, tmp_path)
    architecture = open_architecture(tmp_path)
    layer = architecture.moe_layers[-1]
    name = next(n for n, m in architecture.model.named_modules() if m is architecture.experts_by_layer[layer])
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn((5, model.config.hidden_size), generator=generator)
    topk_ids_TK = torch.tensor([[7, 0], [3, 7], [0, 1], [7, 3], [2, 0]])
    topk_weights_TK = torch.rand((5, 2), generator=generator)
    slots = ExpertSlots(CheckpointWeights(architecture), [ExpertKey(layer, e) for e in (3, 7, 0, 2, 1)], CPU)
    row_P = torch.arange(5).repeat_interleave(2)
    held = slots.layer(layer)
    assert held is not None
    slot_P = held.slots_of(topk_ids_TK.flatten())
    assert slot_P is not None
    got_TH = held.run(hidden_TH, row_P, slot_P, topk_weights_TK.flatten())
    with torch.inference_mode():
        expected_TH = model.get_submodule(name)(hidden_TH, topk_ids_TK, topk_weights_TK)
    torch.testing.assert_close(got_TH, expected_TH, rtol=1e-5, atol=1e-5)
