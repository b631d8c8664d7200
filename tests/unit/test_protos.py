"""The committed protocol stubs are those of the .proto files."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor

from expertmesh.oip import open_inference_pb2
from expertmesh.v1 import admin_pb2, inference_pb2

ROOT = Path(__file__).resolve().parents[2]


def test_committed_stubs_match_the_proto_files() -> None:
    script = ROOT / "tests" / "regenerate_protos.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FILES = [inference_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR, open_inference_pb2.DESCRIPTOR]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_field_has_a_comment(file: FileDescriptor) -> None:
    lines = (ROOT / "protos" / file.name).read_text().splitlines()
    for previous, line in itertools.pairwise(lines):
        text = line.strip()
        is_field = line.startswith(" ") and text.endswith(";") and " = " in text
        if is_field:
            assert previous.strip().startswith("//"), f"{file.name}: {text}"
