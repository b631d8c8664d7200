"""What transformers passes to the registered attention function, and what it leaves out."""

from types import SimpleNamespace

import pytest
import torch

from expertmesh.cluster.errors import UnsupportedModelError
from expertmesh.models import hooks


class Cache:
    """Notes the window that it is asked for."""

    window: int | None = -1

    def attend(self, _layer: int, query: torch.Tensor, _key: object, _value: object, options: object) -> torch.Tensor:
        self.window = options.window  # type: ignore[attr-defined]
        return query


def attend(layer_types: list[str] | None, window: int | None) -> Cache:
    cache = Cache()
    module = SimpleNamespace(
        layer_idx=1, config=SimpleNamespace(layer_types=layer_types), expertmesh_cache=cache, expertmesh_layer=1
    )
    heads = torch.zeros(1, 2, 3, 4)
    hooks._attention_forward(module, heads, heads, heads, None, sliding_window=window)
    return cache


@pytest.mark.parametrize("layer_types", [None, ["sliding_attention", "full_attention"]])
def test_a_full_layer_needs_no_window(layer_types: list[str] | None) -> None:
    assert attend(layer_types, None).window is None


def test_a_sliding_layer_has_its_window() -> None:
    assert attend(["full_attention", "sliding_attention"], 16).window == 16


def test_a_sliding_layer_whose_family_passes_no_window_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 1 is of sliding attention.*would attend to everything"):
        attend(["full_attention", "sliding_attention"], None)
