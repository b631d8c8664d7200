"""`expertmesh chaos`, its result kept beside the machine it ran on.

usage: python -m benchmarks.chaos CHECKPOINT [options of `expertmesh chaos`]
"""

import json
import subprocess
import sys

from benchmarks.record import keep


def main() -> int:
    """Run the command, keep what it printed, and return its exit code."""
    command = [sys.executable, "-m", "expertmesh.actors.cli.main", "chaos", *sys.argv[1:], "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.stdout:
        result = json.loads(done.stdout)
        for row in result["rows"]:
            print(json.dumps(row))
        print(f"kept in {keep('chaos', result)}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
