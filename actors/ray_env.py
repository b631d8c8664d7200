"""Ray's settings that must be in the environment before `import ray`, which reads them once."""

import os
import secrets

from expertmesh.cluster.errors import InputError


def secure_local_ray() -> None:
    """Let a Ray that this process starts answer only those that know a token drawn now; children inherit it."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"


def calm_local_serve() -> None:
    """Have Ray Serve's controller look at its one deployment each second, not ten times as often; children inherit it.

    Each look takes the caches of a core from what computes there (docs/performance.md).
    """
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "1")
    os.environ.setdefault("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "10000")


def require_auth_mode() -> None:
    """Refuse to join a cluster whose authentication the operator left to Ray's changing default.

    Raises:
        InputError: RAY_AUTH_MODE is not set.
    """
    if os.environ.get("RAY_AUTH_MODE") not in ("token", "disabled"):
        raise InputError("set RAY_AUTH_MODE to token (with RAY_AUTH_TOKEN) or disabled, as the cluster has it")
