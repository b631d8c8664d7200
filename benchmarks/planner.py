"""How long planning takes: deepseek-v3 in fp8 on 256 GPUs, wanted under 1 s, as a call and as the whole command.

Each call is of a process of its own, as what it remembers of expected loads would make the second one quicker.

usage: python -m benchmarks.planner [--rounds N] [--json] [--keep]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.record import keep

WANTED_S = 1.0
COMMAND = ("deepseek-v3", "--hardware", "hgx-h100", "--gpus", "256", "--dtype", "fp8", "--tokens-per-step", "8192")
CALL = """
import json, time
from expertmesh.actors.cli import plan_files
from expertmesh.cluster.planner.planner import make_report
from expertmesh.cluster.planner.validation import validate
from expertmesh.cluster.planner.workload import Workload
shape, machine = plan_files.load_shape("deepseek-v3"), plan_files.load_hardware("hgx-h100", 256)
start_s = time.perf_counter()
report = make_report(shape, machine, Workload(tokens_per_step=8192), "fp8")
plan_s = time.perf_counter() - start_s
shapes, machines = plan_files.shipped_shapes(), plan_files.shipped_machines()
start_s = time.perf_counter()
validate(shapes, machines)
validate_s = time.perf_counter() - start_s
print(json.dumps({"plans": len(report.candidates), "plan_s": plan_s, "validate_s": validate_s}))
"""


def main() -> int:
    """Time both, print and return 1 if the command took longer than wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind, interleaved")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    calls: list[dict[str, float]] = []
    command_s: list[float] = []
    for _ in range(arguments.rounds):
        calls.append(json.loads(_run("-c", CALL)))
        start_s = time.perf_counter()
        _run("-m", "expertmesh.actors.cli.main", "plan", *COMMAND, "--json")
        command_s.append(time.perf_counter() - start_s)
    result: dict[str, Any] = {
        "plans": calls[0]["plans"],
        "plan_s": [call["plan_s"] for call in calls],
        "validate_s": [call["validate_s"] for call in calls],
        "command_s": command_s,
        "wanted_s": WANTED_S,
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['plans']} plans of deepseek-v3 on 256 GPUs; median and longest of {arguments.rounds} processes:"
        )
        for what in ("plan_s", "validate_s", "command_s"):
            print(f"{what:>11} {statistics.median(result[what]):.3f} {max(result[what]):.3f}")
        print(f"the command with all it imports: wanted under {WANTED_S:g} s")
    if arguments.keep:
        path = keep("planner", result)
        if not arguments.json:
            print(f"kept in {path}")
    return int(max(command_s) > WANTED_S)


def _run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
