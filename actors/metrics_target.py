"""Where Prometheus finds the metrics of a Ray that was started here.

Ray itself writes such a file only together with its dashboard, which a Ray of our own does without.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_PREFIX = "metrics-"


@contextlib.contextmanager
def metrics_target(folder: Path, address: str) -> Iterator[Path]:
    """Keep a file for Prometheus's file_sd_configs while the context lasts; those of dead processes are removed.

    Args:
        folder: where it is kept, beside those of other servers.
        address: host:port of the metrics; "" keeps no file: the cluster's own operator has Prometheus find them.

    Yields:
        Its path.
    """
    for path in folder.glob(f"{_PREFIX}*.json"):
        pid = path.stem.removeprefix(_PREFIX)
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)
    path = folder / f"{_PREFIX}{os.getpid()}.json"
    if not address:
        yield path
        return
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps([{"targets": [address], "labels": {"job": "expertmesh"}}]))
    unfinished.replace(path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
