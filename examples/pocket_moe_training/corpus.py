"""Where the pocket model's text comes from: five unlike kinds, read from files of any Debian or Ubuntu with Python.

code    the Python standard library's source
legal   licence texts
prose   English about Python: the language reference inside pydoc, and docstrings
manual  man pages, in roff
table   a table of Unicode characters, made from unicodedata

Mail addresses are replaced, and paragraphs that list copyright holders are left out.
"""

import ast
import gzip
import importlib
import inspect
import random
import re
import site
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expertmesh.cluster.errors import InputError

MAX_DOCUMENT_CHARS = 60_000
HOLDOUT_ONE_IN = 20
COMMON_LICENSES = Path("/usr/share/common-licenses")
PACKAGE_DOCS = Path("/usr/share/doc")
MAN_PAGES = Path("/usr/share/man")
MAN_SECTIONS = ("man1", "man2", "man5", "man7", "man8")
TABLE_BLOCK = 128  # code points in a document of the table
MIN_KINDS = 4

_MAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
_HOLDERS = re.compile(r"©|\(c\)|copyright:?\s+\d|^files:|^upstream-|^source:", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Document:
    """One text. Documents of one name are held out together, whatever their kind."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the text is for validation only."""
        return zlib.crc32(self.name.encode()) % HOLDOUT_ONE_IN == 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents by kind, and what was looked for and not found."""

    documents: dict[str, list[Document]]
    missing: list[str]


def collect_corpus(max_chars_per_kind: int, seed: int) -> Corpus:
    """Read all kinds; of a kind with more text than the limit, take a seeded choice of documents.

    Args:
        max_chars_per_kind: Limit on each kind's text, in characters.
        seed: Seed of the choice.

    Returns:
        The kinds that were found, and the names of the sources that were not.

    Raises:
        InputError: fewer than four kinds have text on this machine.
    """
    readers = {"code": _read_code, "legal": _read_legal, "prose": _read_prose, "manual": _read_manual}
    documents: dict[str, list[Document]] = {}
    missing: list[str] = []
    for kind, reader in {**readers, "table": _read_table}.items():
        found = _choose(reader(missing), max_chars_per_kind, random.Random(f"{seed}/{kind}"))
        if found:
            documents[kind] = found
        else:
            missing.append(f"kind {kind}: no text at all")
    if len(documents) < MIN_KINDS:
        raise InputError(f"text of {len(documents)} kinds found, {MIN_KINDS} needed; missing: {missing}")
    return Corpus(documents, missing)


def _choose(found: Iterator[Document], max_chars: int, rng: random.Random) -> list[Document]:
    candidates = list(found)
    rng.shuffle(candidates)
    chosen: list[Document] = []
    num_chars = 0
    for candidate in candidates:
        if num_chars >= max_chars:
            break
        text = _MAIL.sub("name@example.org", candidate.text[:MAX_DOCUMENT_CHARS])
        chosen.append(Document(candidate.name, text))
        num_chars += len(text)
    return chosen


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")


def _standard_modules() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        unwanted = {"test", "tests", "site-packages", "dist-packages", "idle_test", "pydoc_data", "encodings"}
        # _sysconfigdata holds the paths of the machine on which Python was built.
        if not unwanted & set(name.parts) and not name.name.startswith("_sysconfigdata"):
            yield str(name), path


def _read_code(_missing: list[str]) -> Iterator[Document]:
    for name, path in _standard_modules():
        yield Document(name, _read_text(path))


def _read_prose(missing: list[str]) -> Iterator[Document]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        missing.append("prose: pydoc_data.topics")
        topics = {}
    for name, text in sorted(topics.items()):
        yield Document(f"topic {name}", text)
    for name, path in _standard_modules():
        docs = [
            inspect.cleandoc(doc)
            for node in ast.walk(ast.parse(_read_text(path)))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and len(doc := ast.get_docstring(node, clean=False) or "") > 100
        ]
        if docs:
            yield Document(name, "\n\n".join(docs) + "\n")


def _read_legal(missing: list[str]) -> Iterator[Document]:
    sources = {
        str(COMMON_LICENSES): sorted(COMMON_LICENSES.glob("*")),
        f"{PACKAGE_DOCS}/*/copyright": sorted(PACKAGE_DOCS.glob("*/copyright")),
        "licences of Python packages": sorted(
            path
            for folder in [sysconfig.get_paths()["stdlib"], *site.getsitepackages()]
            for path in [*Path(folder).glob("LICENSE*"), *Path(folder).glob("*.dist-info/**/LICENSE*")]
        ),
    }
    seen: set[str] = set()
    for source, paths in sources.items():
        if not paths:
            missing.append(f"legal: {source}")
        for path in paths:
            if path.is_file() and (text := _new_paragraphs(_read_text(path), seen)):
                yield Document(str(path), text)


def _new_paragraphs(text: str, seen: set[str]) -> str:
    """Keep the paragraphs that no earlier file had: the same few licences are in hundreds of files."""
    # In Debian's copyright files a licence is indented by a space, and " ." stands for a blank line.
    paragraphs = re.split(r"\n\s*\n", re.sub(r"(?m)^ (\.$)?", "", text))
    kept: list[str] = []
    for paragraph in paragraphs:
        key = " ".join(paragraph.lower().split())
        if len(key) > 60 and key not in seen and not _HOLDERS.search(paragraph):
            seen.add(key)
            kept.append(inspect.cleandoc("\n" + paragraph))
    return "\n\n".join(kept) + "\n" if kept else ""


def _read_manual(missing: list[str]) -> Iterator[Document]:
    paths = sorted(path for section in MAN_SECTIONS for path in (MAN_PAGES / section).glob("*"))
    if not paths:
        missing.append(f"manual: {MAN_PAGES}")
    for path in random.Random(0).sample(paths, min(len(paths), 1500)):
        # A dangling link is common where documentation was left out of an image.
        text = "\n" + _read_text(path) if path.is_file() else ""
        _preamble, title, body = text.partition("\n.TH ")
        if title:
            yield Document(str(path), ".TH " + body)


def _read_table(_missing: list[str]) -> Iterator[Document]:
    for start in range(0, 0x20000, TABLE_BLOCK):
        rows = []
        for code in range(start, start + TABLE_BLOCK):
            name = unicodedata.name(chr(code), "")
            # Names that only repeat the code point or spell a syllable would drown the others.
            if name and not name.startswith(("CJK ", "HANGUL SYLLABLE", "TANGUT ", "KHITAN ", "NUSHU ")):
                rows.append(f"| U+{code:04X} | {chr(code)} | {name} | {unicodedata.category(chr(code))} |")
        if rows:
            yield Document(f"U+{start:04X}", "\n".join(["| code | char | name | category |", *rows]) + "\n")
