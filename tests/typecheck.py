"""mypy over all folders under their package names: builds a tree of links that mirrors the namespace, and checks it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "typecheck"
LINKS = {
    **{f"expertmesh/{name}": name for name in ("cluster", "kernels", "models", "actors", "client")},
    "expertmesh/oip": "protos/expertmesh/oip",
    "expertmesh/v1": "protos/expertmesh/v1",
    "tests": "tests",
    "benchmarks": "benchmarks",
    "examples": "examples",
}


def main() -> int:
    for link, target in LINKS.items():
        path = TREE / link
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            path.symlink_to(ROOT / target, target_is_directory=True)
    env = {**os.environ, "MYPYPATH": str(TREE)}
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *sys.argv[1:], "."]
    return subprocess.run(command, cwd=TREE, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
