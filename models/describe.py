"""What the rest of the fleet must know of a checkpoint that it never opens."""

from pathlib import Path

from expertmesh.cluster.model_info import CheckpointFacts, ModelInfo
from expertmesh.models.architecture import Architecture, open_architecture
from expertmesh.models.deterministic import require_deterministic
from expertmesh.models.loading import CheckpointWeights
from expertmesh.models.tokenizer import open_tokenizer

_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "top_k_experts",
    "experts_per_token",
)


def inspect_checkpoint(
    directory: Path, dtype: str, max_context: int, *, deterministic: bool = False
) -> CheckpointFacts:
    """Check that a directory can be served, from its configuration and the headers of its files.

    Raises:
        CheckpointError: it cannot; the message says what was found and what is supported.
        InputError: it is to be deterministic, and this machine cannot compute so.
    """
    architecture = open_architecture(directory, dtype)
    if deterministic:
        require_deterministic(architecture)
    weights = CheckpointWeights(architecture)
    return CheckpointFacts(
        info=describe_model(architecture, max_context),
        dense_bytes=weights.dense_bytes(),
        expert_bytes=weights.expert_bytes(),
        expert_width=weights.expert_width(),
    )


def describe_model(architecture: Architecture, max_context: int = 0) -> ModelInfo:
    """Return the facts of a checkpoint.

    Args:
        architecture: the opened checkpoint.
        max_context: tokens that a sequence may have; 0: what the model allows.
    """
    config = architecture.config
    directory: Path = architecture.directory
    return ModelInfo(
        name=directory.resolve().name,
        architecture=type(architecture.model).__name__,
        dtype=str(architecture.dtype).removeprefix("torch."),
        num_layers=config.num_hidden_layers,
        moe_layers=architecture.moe_layers,
        num_experts=architecture.num_experts,
        top_k=next((int(getattr(config, name)) for name in _TOP_K_NAMES if getattr(config, name, None)), 0),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_context=max_context or architecture.max_context,
        eos_token_ids=architecture.eos_token_ids,
        has_tokenizer=open_tokenizer(directory) is not None,
    )
