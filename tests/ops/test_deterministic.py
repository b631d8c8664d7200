"""What deterministic mode refuses, and that what it replaces is put back."""

from pathlib import Path

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from expertmesh.cluster.errors import InputError, UnsupportedModelError
from expertmesh.kernels.cpu import build
from expertmesh.models.architecture import open_architecture
from expertmesh.models.describe import inspect_checkpoint
from expertmesh.models.deterministic import deterministic_math, known_operators, require_deterministic
from tests.families import OWN_CACHE, write_checkpoint


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("mixtral")
    write_checkpoint("mixtral", directory)
    return directory


@pytest.mark.parametrize("family", OWN_CACHE)
def test_a_family_with_its_own_cache_is_refused(family: str, tmp_path: Path) -> None:
    write_checkpoint(family, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"deterministic mode: .* keeps transformers' own cache"):
        inspect_checkpoint(tmp_path, "auto", 0, deterministic=True)
    inspect_checkpoint(tmp_path, "auto", 0)


def test_float16_is_refused(mixtral: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"float32 or bfloat16, not torch\.float16"):
        require_deterministic(open_architecture(mixtral, "float16"))
    require_deterministic(open_architecture(mixtral, "bfloat16"))


@pytest.mark.parametrize("rope", [{"rope_type": "longrope"}, {"full_attention": {"rope_type": "dynamic"}}])
def test_rotary_embeddings_of_the_longest_sequence_are_refused(rope: dict[str, object], mixtral: Path) -> None:
    architecture = open_architecture(mixtral)
    architecture.config.rope_parameters = rope
    with pytest.raises(UnsupportedModelError, match="from the longest sequence of a step"):
        require_deterministic(architecture)


def test_experts_with_a_function_that_is_not_known_are_refused(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = open_architecture(mixtral)
    experts = next(iter(architecture.experts_by_layer.values()))
    monkeypatch.setattr(experts, "act_fn", torch.nn.Mish())
    with pytest.raises(UnsupportedModelError, match=r"the model uses aten\.mish"):
        require_deterministic(architecture)


def test_powers_are_known_by_their_exponent() -> None:
    x = torch.ones(3)
    with known_operators():
        assert x.pow(2).tolist() == [1, 1, 1]
        assert (2.0**x).tolist() == [2, 2, 2]
        with pytest.raises(UnsupportedModelError, match=r"pow\.Tensor_Scalar\[0\.7\]"):
            x.pow(0.7)
        with pytest.raises(UnsupportedModelError, match=r"pow\.Tensor_Tensor"):
            x.pow(x)


def test_the_rotation_in_real_numbers_is_deepseeks() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 5, 8, generator=generator), torch.randn(1, 1, 5, 8, generator=generator)
    angles = torch.randn(1, 5, 4, generator=generator)
    turns = torch.polar(torch.ones_like(angles), angles)
    original = modeling_deepseek_v2.apply_rotary_emb
    expected = original(query, key, turns)
    with deterministic_math():
        assert modeling_deepseek_v2.apply_rotary_emb is not original
        torch.testing.assert_close(modeling_deepseek_v2.apply_rotary_emb(query, key, turns), expected)
    assert modeling_deepseek_v2.apply_rotary_emb is original


def test_a_machine_without_a_compiler_is_refused(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    build.load_invariant_product.cache_clear()
    try:
        with pytest.raises(InputError, match=r"deterministic mode: no C\+\+ compiler"):
            require_deterministic(open_architecture(mixtral))
    finally:
        build.load_invariant_product.cache_clear()
