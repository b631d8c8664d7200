"""What a faulty checkpoint is answered: for each fault an error type and a text that names the file and the fault."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from expertmesh.cluster.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.models.architecture import open_architecture
from expertmesh.models.describe import inspect_checkpoint
from expertmesh.models.expert_slots import ExpertSlots
from expertmesh.models.loading import CheckpointWeights
from expertmesh.models.tensor_files import INDEX_FILE, SINGLE_FILE
from tests.families import write_checkpoint

CPU = torch.device("cpu")
NUM_EXPERTS = 8


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints to copy and damage: one tensor an expert in one file and in many, and all experts in one tensor."""
    kinds = {"single": ("qwen3_moe", "50GB"), "sharded": ("qwen3_moe", "60KB"), "fused": ("granitemoe", "50GB")}
    directories = {kind: tmp_path_factory.mktemp(kind) for kind in kinds}
    for kind, (family, size) in kinds.items():
        write_checkpoint(family, directories[kind], max_shard_size=size)
    return directories


@pytest.fixture
def copy(sound: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        return Path(shutil.copytree(sound[kind], tmp_path / kind))

    return make


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})


def open_all(directory: Path) -> None:
    """Open, and load all of it."""
    architecture = open_architecture(directory)
    weights = CheckpointWeights(architecture)
    weights.load_dense(CPU)
    experts = range(architecture.num_experts)
    ExpertSlots(weights, [ExpertKey(layer, e) for layer in architecture.moe_layers for e in experts], CPU)


def expect(error: type[CheckpointError], directory: Path, *texts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_all(directory)
    assert type(caught.value) is error, caught.value
    for text in (str(directory), *texts):
        assert text in str(caught.value)


def test_the_sound_checkpoints_open(sound: dict[str, Path]) -> None:
    for directory in sound.values():
        open_all(directory)


def test_no_directory(tmp_path: Path) -> None:
    expect(CheckpointError, tmp_path / "nowhere", "no such directory")


def test_no_config(tmp_path: Path) -> None:
    expect(CheckpointError, tmp_path, "no config.json")


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[1]", "must hold a JSON object, found list")],
)
def test_a_config_that_is_no_json_object(content: bytes, text: str, copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    (directory / "config.json").write_bytes(content)
    expect(CheckpointError, directory, "config.json", text)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("hidden_size", "x", "hidden_size"), ("num_attention_heads", 0, "division"), ("hidden_act", "nope", "nope")],
)
def test_a_config_that_makes_no_model(name: str, value: object, text: str, copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    edit_config(directory, **{name: value})
    expect(CheckpointError, directory, "config.json: makes no model", text)


def test_a_damaged_generation_config(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=re.escape(str(directory / "generation_config.json"))):
        inspect_checkpoint(directory, "auto", 0)


def test_an_unknown_model_type(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    edit_config(directory, model_type="qwen99_moe")
    expect(UnsupportedModelError, directory, "'qwen99_moe' is not known to transformers", "supported are", "mixtral")


def test_a_dense_model(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(tmp_path)
    expect(UnsupportedModelError, tmp_path, "LlamaForCausalLM", "has no MoE layers", "supported are", "mixtral")


def test_a_model_that_generates_no_text(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    edit_config(directory, model_type="clip")
    expect(UnsupportedModelError, directory, "'clip'", "supported are")


@pytest.mark.parametrize("model_type", ["qwen99_moe", "clip"])
def test_code_of_the_checkpoints_own_is_refused_and_never_run(model_type: str, copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    mark = directory / "was-run"
    for name in ("configuration_own", "modeling_own"):
        (directory / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "configuration_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit_config(directory, model_type=model_type, auto_map=auto_map)
    expect(UnsupportedModelError, directory, model_type, "brings its own code (auto_map), which is never run")
    assert not mark.exists()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_quantised_checkpoint(dtype: str, copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    edit_config(directory, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match=r"quantised checkpoints \(quantization_config: fp8\)") as caught:
        open_architecture(directory, dtype)
    assert str(directory) in str(caught.value)


def test_a_dtype_that_is_not_served(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    edit_config(directory, dtype="float8_e4m3fn")
    expect(UnsupportedModelError, directory, "float8_e4m3fn", "float32, bfloat16, float16")


def test_no_weights(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    (directory / SINGLE_FILE).unlink()
    expect(CheckpointError, directory, f"neither {SINGLE_FILE} nor {INDEX_FILE}")


def test_pickled_weights_are_named_and_never_read(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    (directory / SINGLE_FILE).unlink()
    # Unpickling this would raise an error of its own.
    (directory / "pytorch_model.bin").write_bytes(b"cnowhere\nnothing\n.")
    expect(CheckpointError, directory, "pickled weights pytorch_model.bin, which are never read")


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("fault", ["truncated", "damaged header", "empty"])
def test_a_damaged_file(fault: str, kind: str, copy: Callable[[str], Path]) -> None:
    directory = copy(kind)
    path = max(directory.glob("*.safetensors"))
    content = path.read_bytes()
    broken = {"truncated": content[:-100], "damaged header": b"\xff" * 9 + content[9:], "empty": b""}[fault]
    path.write_bytes(broken)
    expect(CorruptCheckpointError, directory, path.name, f"truncated or damaged ({len(broken)} bytes)")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 5}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../b"}}',
    ],
)
def test_a_damaged_index(content: str, copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    (directory / INDEX_FILE).write_text(content)
    expect(CorruptCheckpointError, directory, INDEX_FILE)


def test_the_index_names_a_missing_file(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    path = max(directory.glob("*.safetensors"))
    path.unlink()
    expect(CorruptCheckpointError, directory, path.name, "there is no such file")


def test_the_index_names_a_missing_tensor(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    path = max(directory.glob("*.safetensors"))
    tensors = load_file(path)
    lost = min(tensors)
    del tensors[lost]
    save_file(tensors, path)
    expect(CorruptCheckpointError, directory, path.name, f"no tensor {lost!r}", INDEX_FILE)


def expert_tensor(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"


@pytest.mark.parametrize(
    ("lost", "texts"),
    [
        ((5,), ("7 of 8 tensors", "missing are those of experts [5]")),
        ((0, 1, 2, 4, 5, 6, 7), ("1 of 8 tensors", "missing are those of experts [0, 1, 2, 4, 5, 6, 7]")),
        (tuple(range(NUM_EXPERTS)), ("0 of 8 tensors",)),
    ],
)
def test_a_missing_tensor_of_an_expert(
    lost: tuple[int, ...], texts: tuple[str, ...], copy: Callable[[str], Path]
) -> None:
    directory = copy("single")
    edit_tensors(directory, lambda tensors: [tensors.pop(expert_tensor(1, expert)) for expert in lost])
    expect(CorruptCheckpointError, directory, "layer 1", "gate_proj", *texts)


def test_an_expert_under_another_number(copy: Callable[[str], Path]) -> None:
    """As many tensors as there are experts, but one of them is no expert's of this model."""
    directory = copy("single")
    edit_tensors(directory, lambda tensors: tensors.update({expert_tensor(0, 9): tensors.pop(expert_tensor(0, 4))}))
    expect(
        CorruptCheckpointError,
        directory,
        "layer 0",
        "missing are those of experts [4]",
        "too many are those of experts [9]",
    )


def test_a_layer_without_its_experts(copy: Callable[[str], Path]) -> None:
    directory = copy("fused")
    edit_tensors(directory, lambda tensors: tensors.pop("model.layers.2.block_sparse_moe.input_linear.weight"))
    expect(CorruptCheckpointError, directory, "layer 2: no tensor for experts' gate_up_proj")


def test_more_experts_in_a_tensor_than_in_the_config(copy: Callable[[str], Path]) -> None:
    directory = copy("fused")
    edit_config(directory, num_local_experts=6)
    expect(CorruptCheckpointError, directory, "layer 0", "holds 8 experts, there are 6")


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("single", expert_tensor(1, 3), (24, 31)),
        ("single", expert_tensor(1, 3), (24,)),
        ("fused", "model.layers.1.block_sparse_moe.output_linear.weight", (8, 31, 48)),
    ],
)
def test_an_expert_of_another_shape(kind: str, name: str, shape: tuple[int, ...], copy: Callable[[str], Path]) -> None:
    directory = copy(kind)
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    expect(CorruptCheckpointError, directory, "layers.1", "expert")


def test_a_missing_dense_tensor(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    edit_tensors(directory, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    expect(CorruptCheckpointError, directory, "1 tensors are wrong: missing model.layers.1.self_attn.q_proj.weight")


def test_a_dense_tensor_of_another_shape(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    edit_tensors(directory, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}))
    expect(CorruptCheckpointError, directory, "another shape", "model.norm.weight")


def test_tensors_beyond_the_model_are_passed_over(copy: Callable[[str], Path]) -> None:
    """Such as layers that predict tokens further ahead, which many releases carry."""
    directory = copy("single")
    extra = {"model.layers.3.self_attn.q_proj.weight": torch.zeros(64, 32), expert_tensor(3, 0): torch.zeros(24, 32)}
    edit_tensors(directory, lambda tensors: tensors.update(extra))
    open_all(directory)
    with safe_open(directory / SINGLE_FILE, framework="pt") as handle:
        assert set(extra) < set(handle.keys())


def test_a_file_that_is_exchanged_is_not_read(copy: Callable[[str], Path]) -> None:
    """Half of the experts of one model and half of another would serve, and say nothing."""
    directory = copy("single")
    weights = CheckpointWeights(open_architecture(directory))
    key = ExpertKey(weights.architecture.moe_layers[0], 0)
    weights.load_expert(key)
    weights.release()
    weights.load_expert(key)
    weights.release()
    edit_tensors(directory, lambda tensors: None)
    for _ in range(2):  # who asks again is told again
        with pytest.raises(CorruptCheckpointError, match=rf"{SINGLE_FILE}.*not the file any more"):
            weights.load_expert(key)


def test_what_was_read_leaves_memory(copy: Callable[[str], Path]) -> None:
    directory = copy("fused")
    weights = CheckpointWeights(open_architecture(directory))
    weights.load_expert(ExpertKey(weights.architecture.moe_layers[0], 0))
    assert str(directory) in Path("/proc/self/maps").read_text()
    weights.release()
    assert str(directory) not in Path("/proc/self/maps").read_text()
    dense = weights.load_dense(CPU)
    assert str(directory) not in Path("/proc/self/maps").read_text()
    assert all(parameter.isfinite().all() for parameter in dense.parameters() if not parameter.is_meta)
