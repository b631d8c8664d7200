"""How much `expertmesh doctor --measure` measures with."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the layers that are timed, and how often.

    hidden_size, expert_width: multiples of 32. num_layers, num_dense_layers: together more than the caches hold.
    expert_rows: rows of an expert, three numbers at least. dense_rows: few and many. attended: tokens, few and many.
    engine_layers: of two small models. sequences: few and many. vocabulary: small and large.
    """

    hidden_size: int = 1024
    expert_width: int = 512
    num_experts: int = 16
    num_layers: int = 8
    expert_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 256)
    num_dense_layers: int = 24
    num_heads: int = 16
    num_kv_heads: int = 8
    head_size: int = 64
    dense_rows: tuple[int, int] = (1, 32)
    attended: tuple[int, int] = (16, 256)
    vocabulary: tuple[int, int] = (1024, 32768)
    engine_layers: tuple[int, int] = (1, 3)
    sequences: tuple[int, int] = (1, 32)
    link_rows: tuple[int, int] = (1, 64)
    swept_bytes: int = 64 << 20
    rounds: int = 15


TINY = Sizes(
    hidden_size=64,
    expert_width=32,
    num_experts=4,
    num_layers=2,
    expert_rows=(1, 8, 64),
    num_dense_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_size=32,
    dense_rows=(1, 32),
    attended=(4, 512),
    vocabulary=(64, 8192),
    sequences=(1, 4),
    link_rows=(1, 4096),
    swept_bytes=1 << 20,
    rounds=3,
)
