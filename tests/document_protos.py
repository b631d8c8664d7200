"""Write docs/api.md from the comments of the .proto files; with --check, only say whether the committed one differs."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).resolve().parents[1]
PROTOS = ROOT / "protos"
PAGE = ROOT / "docs" / "api.md"
# In the order in which the page has them.
SOURCES = (
    "expertmesh/v1/inference.proto",
    "expertmesh/v1/admin.proto",
    "expertmesh/oip/open_inference.proto",
)
HEAD = """# gRPC interface

All services on the gateway's gRPC port. Health (`grpc.health.v1.Health`) and server reflection are on as well.

Written from the comments in `protos/` by `make protos`; edit those. Fields marked `optional` are absent unless they are
set; all others have proto3's defaults: 0, empty, false.
"""

# Where SourceCodeInfo keeps the comment of what: numbers of fields in descriptor.proto, and indices.
Place = tuple[int, ...]
SYNTAX, MESSAGE, ENUM, SERVICE = 12, 4, 5, 6
FIELD, NESTED, NESTED_ENUM, ONEOF = 2, 3, 4, 8
METHOD, VALUE = 2, 2


class Comments:
    """The comments of one file."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._locations = {tuple(location.path): location for location in file.source_code_info.location}

    def of(self, place: Place) -> str:
        """Return what stands before a declaration; empty if nothing does."""
        return self._locations[place].leading_comments.rstrip() if place in self._locations else ""

    def of_file(self) -> str:
        """Return what stands at the top of the file."""
        return "\n\n".join(text.rstrip() for text in self._locations[(SYNTAX,)].leading_detached_comments)


def read_files() -> list[FileDescriptorProto]:
    """Return the descriptors of the .proto files, with their comments."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "descriptors"
        options = [f"-I{PROTOS}", "--include_source_info", f"--descriptor_set_out={out}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *options, *SOURCES], check=True, cwd=ROOT)
        by_name = {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}
    return [by_name[name] for name in SOURCES]


def render(files: list[FileDescriptorProto]) -> str:
    """Return the page."""
    parts = [HEAD, "## Contents\n\n" + "\n".join(line for file in files for line in _contents(file)) + "\n"]
    for file in files:
        comments = Comments(file)
        parts.append(f"## {file.name.removeprefix('expertmesh/')}\n\n{_paragraphs(comments.of_file())}")
        for index, service in enumerate(file.service):
            parts.append(_service(file.package, service, comments, (SERVICE, index)))
        for name, message, place in _messages(file):
            parts.append(_message(file.package, name, message, comments, place))
        for name, enum, place in _enums(file):
            parts.append(_enum(file.package, name, enum, comments, place))
    return "\n".join(parts)


def _contents(file: FileDescriptorProto) -> Iterator[str]:
    """Yield lines of the table of contents: services with their calls, then all messages and enums."""
    for service in file.service:
        full_name = f"{file.package}.{service.name}"
        yield f"- {_link(full_name, full_name)}: {', '.join(f'`{method.name}`' for method in service.method)}"
    names = [name for name, *_ in _messages(file)] + [name for name, *_ in _enums(file)]
    yield f"  - messages: {', '.join(_link(f'{file.package}.{name}', name) for name in sorted(names))}"


def _messages(file: FileDescriptorProto) -> Iterator[tuple[str, DescriptorProto, Place]]:
    """Yield name, descriptor and place of each message, nested ones after the one that they are in."""

    def walk(prefix: str, message: DescriptorProto, place: Place) -> Iterator[tuple[str, DescriptorProto, Place]]:
        name = prefix + message.name
        yield name, message, place
        for index, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                yield from walk(f"{name}.", nested, (*place, NESTED, index))

    for index, message in enumerate(file.message_type):
        yield from walk("", message, (MESSAGE, index))


def _enums(file: FileDescriptorProto) -> Iterator[tuple[str, EnumDescriptorProto, Place]]:
    for index, enum in enumerate(file.enum_type):
        yield enum.name, enum, (ENUM, index)
    for name, message, place in _messages(file):
        for index, enum in enumerate(message.enum_type):
            yield f"{name}.{enum.name}", enum, (*place, NESTED_ENUM, index)


def _service(package: str, service: ServiceDescriptorProto, comments: Comments, place: Place) -> str:
    full_name = f"{package}.{service.name}"
    rows = []
    for index, method in enumerate(service.method):
        takes = _type_link(method.input_type, package, is_stream=method.client_streaming)
        gives = _type_link(method.output_type, package, is_stream=method.server_streaming)
        rows.append((f"`{method.name}`", takes, gives, _cell(comments.of((*place, METHOD, index)))))
    table = _table(("call", "takes", "gives", "does"), rows)
    return f"{_heading(full_name, f'Service {full_name}')}\n{_paragraphs(comments.of(place))}\n{table}"


def _message(package: str, name: str, message: DescriptorProto, comments: Comments, place: Place) -> str:
    rows = []
    for index, field in enumerate(message.field):
        said = _cell(comments.of((*place, FIELD, index)))
        if field.HasField("oneof_index") and not field.proto3_optional:
            said = f"One of `{message.oneof_decl[field.oneof_index].name}`. {said}"
        rows.append((str(field.number), f"`{field.name}`", _field_type(package, message, field), said))
    table = _table(("no.", "field", "type", "holds"), rows) if rows else "No fields.\n"
    # Each field marked optional is a choice of one, too, which is not in the source and has no comment.
    choices = [
        f"`{choice.name}`: {_cell(comments.of((*place, ONEOF, index)))}\n"
        for index, choice in enumerate(message.oneof_decl)
        if comments.of((*place, ONEOF, index))
    ]
    said = _paragraphs(comments.of(place))
    return "\n".join(part for part in (_heading(f"{package}.{name}", name), said, *choices, table) if part)


def _enum(package: str, name: str, enum: EnumDescriptorProto, comments: Comments, place: Place) -> str:
    rows = [
        (str(value.number), f"`{value.name}`", _cell(comments.of((*place, VALUE, index))))
        for index, value in enumerate(enum.value)
    ]
    table = _table(("no.", "value", "means"), rows)
    return f"{_heading(f'{package}.{name}', name)}\n{_paragraphs(comments.of(place))}\n{table}"


def _field_type(package: str, message: DescriptorProto, field: FieldDescriptorProto) -> str:
    for nested in message.nested_type:
        if nested.options.map_entry and nested.name == field.type_name.rpartition(".")[2]:
            key, value = nested.field
            return f"map of {_field_type(package, nested, key)} to {_field_type(package, nested, value)}"
    name = FieldDescriptorProto.Type.Name(field.type)
    kind = _type_link(field.type_name, package) if field.type_name else name.removeprefix("TYPE_").lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"optional {kind}" if field.proto3_optional else kind


def _type_link(type_name: str, package: str, *, is_stream: bool = False) -> str:
    full_name = type_name.removeprefix(".")
    link = _link(full_name, full_name.removeprefix(f"{package}."))
    return f"stream of {link}" if is_stream else link


def _link(target: str, text: str) -> str:
    return f"[{text}](#{target})"


def _heading(anchor: str, text: str) -> str:
    return f'<a id="{anchor}"></a>\n\n### {text}\n'


def _paragraphs(comment: str) -> str:
    """Return a comment as text; its lines that are set further in are shown as they are."""
    lines: list[str] = []
    is_verbatim = False
    for line in comment.splitlines():
        text = line.removeprefix(" ")
        if text.startswith("  ") != is_verbatim:
            is_verbatim = not is_verbatim
            lines += ["", "```text"] if is_verbatim else ["```", ""]
        lines.append(text.removeprefix("  ") if is_verbatim else _escape(text))
    lines += ["```"] if is_verbatim else []
    return "\n".join(lines) + "\n" if lines else ""


def _cell(comment: str) -> str:
    return _escape(" ".join(comment.split())).replace("|", "\\|")


def _escape(text: str) -> str:
    """Return a text in which Markdown sees no HTML and no emphasis."""
    return text.replace("<", "&lt;").replace("*", "\\*")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the committed page differs")
    check: bool = parser.parse_args().check
    page = render(read_files())
    is_same = PAGE.is_file() and PAGE.read_text() == page
    if check:
        if not is_same:
            sys.stderr.write("docs/api.md differs from the .proto files; run tests/document_protos.py\n")
        return 0 if is_same else 1
    PAGE.write_text(page)
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} {'is as it was' if is_same else 'changed'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
