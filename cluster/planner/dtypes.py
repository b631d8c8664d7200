"""Number formats of a served model: bytes of weights and of what crosses links."""

from dataclasses import dataclass

from expertmesh.cluster.errors import UnknownNameError


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """Bytes of one value, by where it is, scales of blocks included.

    expert and dense name the arithmetic (a key of Hardware.flop_per_s) of routed experts and of everything else.
    Embeddings, head and router stay in bf16 in every format, and so do keys and values.
    """

    name: str
    expert_weight_bytes: float
    dense_weight_bytes: float
    dispatch_bytes: float
    expert: str
    dense: str
    combine_bytes: float = 2.0
    table_bytes: float = 2.0
    kv_bytes: float = 2.0


# fp8 weights carry a float32 scale for each 128 x 128 block, fp8 tokens one for each 128 values (DeepSeek-V3 technical
# report, section 3.3.2). NVFP4 has an fp8 scale for each 16 values (NVIDIA, "Introducing NVFP4"); the published NVFP4
# checkpoints keep attention and shared experts in bf16 (nvidia/DeepSeek-R1-NVFP4, GLM-5.1-478B-NVFP4).
_FP8_BLOCK_BYTES = 1 + 4 / 128**2
_FP8_TOKEN_BYTES = 1 + 4 / 128
_NVFP4_BYTES = 0.5 + 1 / 16

FORMATS = {
    known.name: known
    for known in (
        Format(
            name="bf16",
            expert_weight_bytes=2.0,
            dense_weight_bytes=2.0,
            dispatch_bytes=2.0,
            expert="bf16",
            dense="bf16",
        ),
        Format(
            name="fp8",
            expert_weight_bytes=_FP8_BLOCK_BYTES,
            dense_weight_bytes=_FP8_BLOCK_BYTES,
            dispatch_bytes=_FP8_TOKEN_BYTES,
            expert="fp8",
            dense="fp8",
        ),
        Format(
            name="nvfp4",
            expert_weight_bytes=_NVFP4_BYTES,
            dense_weight_bytes=2.0,
            dispatch_bytes=_FP8_TOKEN_BYTES,
            expert="nvfp4",
            dense="bf16",
        ),
    )
}


def find_format(name: str) -> Format:
    """Return a format by its name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in FORMATS:
        raise UnknownNameError(f"dtype {name!r} is unknown; known are {', '.join(FORMATS)}")
    return FORMATS[name]
