"""Write the protocol stubs anew from protos/; with --check, only say whether the committed ones differ."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTOS = ROOT / "protos"
PACKAGES = (Path("expertmesh/v1"), Path("expertmesh/oip"))


def generate(out: Path) -> dict[str, bytes]:
    """Run protoc into the folder `out`; return the stubs written, by their path below protos/."""
    # The plugins lie beside the interpreter, which need not be on the PATH.
    plugins = [
        f"--plugin={name}={Path(sys.executable).parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
    typed = [f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")]
    sources = [str(path.relative_to(PROTOS)) for path in proto_files()]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *plugins, *outputs, *typed, *sources]
    subprocess.run(command, check=True, cwd=ROOT)
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*_pb2*"))}


def proto_files() -> list[Path]:
    """Return all .proto files, package by package."""
    return [path for package in PACKAGES for path in sorted((PROTOS / package).glob("*.proto"))]


def differing(stubs: dict[str, bytes]) -> list[str]:
    """Return the names of committed stubs that are missing, superfluous, or unlike `stubs`."""
    paths = [path for package in PACKAGES for path in (PROTOS / package).glob("*_pb2*.py*")]
    committed = {str(path.relative_to(PROTOS)): path.read_bytes() for path in paths}
    return sorted(name for name in stubs.keys() | committed.keys() if stubs.get(name) != committed.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the committed stubs differ")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        stubs = generate(Path(scratch))
    names = differing(stubs)
    if check:
        if names:
            sys.stderr.write(
                f"stubs differ from the .proto files; run tests/regenerate_protos.py: {', '.join(names)}\n"
            )
        return 1 if names else 0
    for name in names:
        path = PROTOS / name
        if name in stubs:
            path.write_bytes(stubs[name])
        else:
            path.unlink()
    sys.stdout.write(f"{len(stubs)} stubs, {len(names)} changed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
