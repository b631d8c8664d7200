"""What the parts that never open a checkpoint must know of the model."""

from dataclasses import dataclass

from expertmesh.cluster.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """The model served; a plain value that crosses processes.

    architecture is the class name in transformers; dtype names the weights' number format. moe_layers are indices of
    decoder layers, rising, dense layers counted in num_layers. Each of them has num_experts routed experts, of which
    the router chooses top_k for a token, whose hidden state has hidden_size numbers. Token ids run from 0 to
    vocab_size - 1; prompt and output together have at most max_context tokens; eos_token_ids end a sequence. Without a
    tokenizer only token ids are accepted.
    Each expert is cut across its width in expert_tp slices, which are placed, copied and computed as experts are.
    """

    name: str
    architecture: str
    dtype: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...] = ()
    has_tokenizer: bool = False
    expert_tp: int = 1

    @property
    def num_slices(self) -> int:
        """What is placed of each layer: slice s of expert e has number e * expert_tp + s there."""
        return self.num_experts * self.expert_tp


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """A checkpoint that can be served, and the bytes of its dense half and of one expert in the serving dtype.

    expert_width is that between the expert's matrices, in which it can be cut.
    """

    info: ModelInfo
    dense_bytes: int
    expert_bytes: int
    expert_width: int


def require_divisible(expert_width: int, expert_tp: int) -> None:
    """Raise InputError unless experts of this width can be cut in expert_tp equal slices."""
    if expert_width % expert_tp:
        raise InputError(f"expert_tp={expert_tp} does not divide the experts' width of {expert_width}")
