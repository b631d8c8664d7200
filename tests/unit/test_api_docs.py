"""docs/api.md is what the .proto files say, whole, and its links lead somewhere."""

import re
import subprocess
import sys

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from tests.document_protos import PAGE, PROTOS, ROOT, SOURCES, read_files, render


@pytest.fixture(scope="module")
def files() -> list[FileDescriptorProto]:
    return read_files()


def test_the_committed_page_matches_the_proto_files() -> None:
    script = ROOT / "tests" / "document_protos.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_proto_file_is_on_the_page() -> None:
    assert sorted(SOURCES) == sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))


def test_every_comment_is_on_the_page(files: list[FileDescriptorProto]) -> None:
    page = _words(PAGE.read_text())
    for file in files:
        comments = [location.leading_comments for location in file.source_code_info.location]
        assert len([comment for comment in comments if comment]) > 50
        assert not [comment for comment in comments if _words(comment) not in page]


def test_every_link_leads_somewhere_and_no_anchor_is_there_twice() -> None:
    text = PAGE.read_text()
    anchors = re.findall(r'<a id="([^"]+)">', text)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(anchors)


def test_a_page_shows_types_calls_and_what_would_break_its_tables() -> None:
    file = FileDescriptorProto(name="expertmesh/v1/small.proto", package="small", syntax="proto3")
    message = file.message_type.add(name="Asked")
    message.oneof_decl.add(name="what")
    message.field.add(name="one", number=1, type=9, label=1, oneof_index=0)
    message.field.add(name="many", number=3, type=11, label=3, type_name=".small.Asked")
    entry = message.nested_type.add(name="KeyedEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=9, label=1)
    entry.field.add(name="value", number=2, type=11, label=1, type_name=".small.Asked")
    message.field.add(name="keyed", number=4, type=11, label=3, type_name=".small.Asked.KeyedEntry")
    message.oneof_decl.add(name="_maybe")
    message.field.add(name="maybe", number=5, type=13, label=1, oneof_index=1, proto3_optional=True)
    service = file.service.add(name="Asking")
    service.method.add(name="Ask", input_type=".small.Asked", output_type=".small.Asked", server_streaming=True)
    for path, comment in (
        ((6, 0), " Errors:\n   A  first\n   B  second\n Done."),
        ((4, 0, 8, 0), " One is needed.\n"),
        ((4, 0, 2, 0), " Below 1 | above\n <2> *now*.\n"),
    ):
        file.source_code_info.location.add(path=path, leading_comments=comment)
    file.source_code_info.location.add(path=(12,), leading_detached_comments=[" What it is.\n"])
    page = render([file])
    for part in (
        "## v1/small.proto\n\nWhat it is.\n",
        "Errors:\n\n```text\nA  first\nB  second\n```\n\nDone.\n",
        "| `Ask` | [Asked](#small.Asked) | stream of [Asked](#small.Asked) |  |",
        "`what`: One is needed.\n",
        "| 1 | `one` | string | One of `what`. Below 1 \\| above &lt;2> \\*now\\*. |",
        "| 3 | `many` | repeated [Asked](#small.Asked) |  |",
        "| 4 | `keyed` | map of string to [Asked](#small.Asked) |  |",
        "| 5 | `maybe` | optional uint32 |  |",
    ):
        assert part in page
    assert "KeyedEntry" not in page


def _words(text: str) -> str:
    """Return a text without its breaks and what Markdown needs."""
    return " ".join(text.replace("&lt;", "<").replace("\\", "").replace("```text", "").replace("```", "").split())
