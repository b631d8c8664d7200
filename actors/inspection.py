"""What a checkpoint is: known from an earlier look, or found out in a process that ends afterwards."""

from pathlib import Path

from expertmesh.cluster.errors import ExpertMeshError
from expertmesh.cluster.model_info import CheckpointFacts
from expertmesh.cluster.settings import ServeSettings
from expertmesh.models.kept_facts import facts_path, keep_facts, kept_facts


def known_facts(settings: ServeSettings) -> CheckpointFacts | None:
    """Return the checkpoint's facts if this machine keeps them."""
    kept_at = _facts_path(settings)
    return None if kept_at is None else kept_facts(kept_at)


def inspect(settings: ServeSettings) -> CheckpointFacts | ExpertMeshError:
    """Open the checkpoint, and keep and return its facts or return why it cannot be served.

    Imports torch and transformers, so that whoever serves clients has this done in a process of its own.
    """
    from expertmesh.kernels.cpu.build import compile_all
    from expertmesh.models.describe import inspect_checkpoint

    compile_all()  # once here, so that shards and workers of this machine find them ready
    try:
        facts = inspect_checkpoint(
            settings.model, settings.dtype, settings.max_context, deterministic=settings.deterministic
        )
    except ExpertMeshError as error:
        return error
    kept_at = _facts_path(settings)
    if kept_at is not None:
        keep_facts(facts, kept_at)
    return facts


def _facts_path(settings: ServeSettings) -> Path | None:
    """Return where the checkpoint's facts are kept; None: they have to be found out."""
    if settings.deterministic:  # whether this machine can be is not known from the checkpoint
        return None
    try:
        return facts_path(settings.model, settings.dtype, settings.max_context)
    except OSError:
        return None  # the inspection says which file cannot be read, and what of it
