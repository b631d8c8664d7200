"""What transformers' code does in each decoder layer of a model, seen in steps made for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from expertmesh.cluster.scheduler import Chunk
from expertmesh.kernels.paged_attention import PagedKVCache, StepLayout
from expertmesh.models import hooks

# What the steps need: pages, of which they use the first, and tokens a page.
NUM_PAGES, PAGE_SIZE = 3, 4


@dataclass
class Seen:
    """What transformers' code did in one layer in one step: hidden in, keys and values written, what came out.

    attended and projected: before and behind attention's output projection; joined and normed: before and behind the
    norm that follows. routed: what the experts were given, hidden states, ids and weights; they gave the first back.
    """

    layout: StepLayout
    input_1TH: Tensor
    rope: Any
    written: tuple[Tensor, Tensor] | None = None
    attended: Any = None
    projected: Any = None
    joined: Any = None
    normed: Any = None
    routed: tuple[Tensor, Tensor, Tensor] | None = None
    mlp_output: Any = None
    output: Any = None


def decoder_layers(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that are made of attention, a norm before it, a norm behind it and a block behind that."""
    names = ("self_attn", "input_layernorm", "post_attention_layernorm")
    for module in model.modules():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names) and mlp_of(module) is not None:
            yield module


def mlp_of(layer: Any) -> Any:
    """Return the block behind a layer's attention, by the names that families give it."""
    return next((block for name in ("mlp", "block_sparse_moe") if (block := getattr(layer, name, None))), None)


def experts_of(layer: Any) -> Any:
    """Return the one module that holds the experts behind a layer's attention; None: there is none, or several."""
    found = [module for module in mlp_of(layer).modules() if hasattr(module, "expertmesh_layer")]
    return found[0] if len(found) == 1 else None


def steps_to_watch(model: Any, page_size: int) -> list[list[Chunk]]:
    """Return a prompt that takes more than a page, and then a decoded token of it beside another prompt."""
    vocab_size = model.get_input_embeddings().num_embeddings
    ids = tuple((17 + 31 * i) % vocab_size for i in range(page_size + 3))
    first = Chunk("first", 0, ids, (1, 0), samples=True)
    return [
        [first],
        [Chunk("second", 0, ids[:3], (2,), samples=True), Chunk("first", len(ids), ids[-1:], (1, 0), samples=True)],
    ]


def watch(
    model: nn.Module,
    layers: Sequence[Any],
    cache: PagedKVCache,
    run_step: Callable[[Sequence[Chunk]], Tensor],
    chunks: Sequence[Chunk],
) -> dict[Any, Seen]:
    """Run a step of transformers' code and return what each layer did; experts give back what they get."""
    seen: dict[Any, Seen] = {}
    owners = {experts.expertmesh_layer: layer for layer in layers if (experts := experts_of(layer)) is not None}

    def route(index: int, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if index in owners:
            seen[owners[index]].routed = (hidden_TH.clone(), ids_TK.clone(), weights_TK.clone())
        return hidden_TH

    def enter(layer: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        assert cache.layout is not None, "a step without a layout"
        seen[layer] = Seen(cache.layout, hidden.clone(), kwargs.get("position_embeddings"))

    def attend(layer: Any, args: Any) -> None:
        keys, values = cache.tensors(layer.self_attn.layer_idx)
        seen[layer].written = (keys[seen[layer].layout.write_T], values[seen[layer].layout.write_T])
        seen[layer].attended = args[0].clone()

    def project(layer: Any, output: Any) -> None:
        seen[layer].projected = output.clone()

    def join(layer: Any, args: Any) -> None:
        seen[layer].joined = args[0].clone()

    def leave_mlp(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen[layer].normed, seen[layer].mlp_output = hidden.clone(), hidden_of(output)

    def leave(layer: Any, output: Any) -> None:
        seen[layer].output = output

    handles = []
    for layer in layers:
        handles += [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            mlp_of(layer).register_forward_hook(
                lambda _, args, kwargs, output, layer=layer: leave_mlp(layer, args, kwargs, output), with_kwargs=True
            ),
            layer.register_forward_hook(lambda layer, _, output: leave(layer, output)),
        ]
        out = getattr(layer.self_attn, "o_proj", None)
        if out is not None:
            handles.append(out.register_forward_pre_hook(lambda _, args, layer=layer: attend(layer, args)))
            handles.append(out.register_forward_hook(lambda _, __, output, layer=layer: project(layer, output)))
        norm = layer.post_attention_layernorm
        handles.append(norm.register_forward_pre_hook(lambda _, args, layer=layer: join(layer, args)))
    try:
        with hooks.other_experts(model, route):
            run_step(chunks)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def hidden_of(output: Any) -> Any:
    """Return a block's hidden states; some give router logits beside them."""
    return output[0] if isinstance(output, tuple) else output
