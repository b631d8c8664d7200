"""How a peer's process is asked: lines of JSON in, lines of JSON out. It imports nothing of ours.

The process writes {"ready_s": ...} once its model is loaded. {"prompts": [[id, ...], ...], "new": n, "seed": s} is
answered with {"seconds": ...}, the time to generate exactly n tokens for each prompt, sampled at temperature 1;
{"memory": true} with {"bytes": ...}, the peak resident memory of the process and its children.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# (prompts, tokens to generate for each, seed)
Generate = Callable[[list[list[int]], int, int], None]


def serve(load: Callable[[], Generate]) -> None:
    """Load a model and answer until the input ends. What the peer prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started_s = time.perf_counter()
    generate = load()
    print(json.dumps({"ready_s": time.perf_counter() - started_s}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("memory"):
            answer = {"bytes": float(_peak_bytes())}
        else:
            started_s = time.perf_counter()
            generate(asked["prompts"], asked["new"], asked["seed"])
            answer = {"seconds": time.perf_counter() - started_s}
        print(json.dumps(answer), file=answers, flush=True)


def _peak_bytes() -> int:
    family = {str(os.getpid())}
    for entry in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
        try:
            parent = entry.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it ended meanwhile
            continue
        if parent in family:
            family.add(entry.parent.name)
    peaks = [Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2] for pid in family]
    return sum(int(peak.split()[0]) * 1024 for peak in peaks if peak)
